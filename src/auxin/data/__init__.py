"""Corpora: reading, tokenizing, packing, and loading in an order that can be resumed."""

from auxin.data.corpus import CorpusReport, PackedData, prepare
from auxin.data.loader import make_loader
from auxin.data.settings import CorpusSettings

__all__ = ["CorpusReport", "CorpusSettings", "PackedData", "make_loader", "prepare"]
