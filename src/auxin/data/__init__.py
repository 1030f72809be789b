"""Data of any kind: reading, preparing, and loading in an order that can be resumed."""

from auxin.data.corpus import CorpusReport, PackedData, prepare
from auxin.data.dataset import Dataset, DatasetSettings, SampleForm
from auxin.data.loader import Contexts, make_loader
from auxin.data.settings import CorpusSettings

__all__ = [
    "Contexts",
    "CorpusReport",
    "CorpusSettings",
    "Dataset",
    "DatasetSettings",
    "PackedData",
    "SampleForm",
    "make_loader",
    "prepare",
]
