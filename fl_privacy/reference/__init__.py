"""Reference models and image data that simulations, studies and tests share.

Nothing in the library itself rests on this package. It needs the extra `simulation`
(`pip install '.[simulation]'`); what is missing is named when it is first needed.
"""

from fl_privacy.reference.datasets import DATASETS, ImageData, ImageSet, load_dataset
from fl_privacy.reference.models import MODELS, build_model, init_uniform_

__all__ = ["DATASETS", "MODELS", "ImageData", "ImageSet", "build_model", "init_uniform_", "load_dataset"]
