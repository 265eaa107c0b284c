"""The public names, which :mod:`retrieval_tip` imports when they are first used."""

from .backbones.base import Backbone as Backbone
from .backbones.base import Identity as Identity
from .backbones.loading import load_backbone as load_backbone
from .classifier import Classifier as Classifier
from .classifier import Explanation as Explanation
from .data.encoding_cache import EncodingCache as EncodingCache
from .data.reader import Reader as Reader
from .data.sources import Source as Source
from .data.sources import open_inputs as open_inputs
from .data.sources import open_source as open_source
from .errors import RetrievalTipError as RetrievalTipError
from .estimator import ImageEncoder as ImageEncoder
from .estimator import TipAdapterClassifier as TipAdapterClassifier
from .evaluation.calibration import Calibration as Calibration
from .evaluation.compare import Compared as Compared
from .evaluation.compare import Side as Side
from .evaluation.compare import compare as compare
from .evaluation.evaluate import Evaluation as Evaluation
from .fit.closed_form import FormChoice as FormChoice
from .fit.finetune import Tuned as Tuned
from .index.build import build_index as build_index
from .index.places import Changed as Changed
from .labelling.pool import Suggestions as Suggestions
from .labelling.pool import suggest_photos as suggest_photos
from .labelling.sort import Sorted as Sorted
from .labelling.sort import sort_photos as sort_photos
from .labelling.sort import undo_sort as undo_sort
from .model import Index as Index
from .model import verify as verify
from .pictures import open_images as open_images
from .predictions import Neighbour as Neighbour
from .predictions import Prediction as Prediction
from .predictions import Predictions as Predictions
from .predictions import SimilarShot as SimilarShot
from .settings import Recipe as Recipe
from .settings import Settings as Settings
from .store.edits import Edits as Edits
from .store.edits import NewKeys as NewKeys

__version__: str
