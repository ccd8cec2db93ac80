"""The files of a minimal audited Flower app, as `fl-privacy init` writes them."""
