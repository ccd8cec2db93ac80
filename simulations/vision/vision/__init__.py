"""Federated image classification, audited: a Flower app."""
