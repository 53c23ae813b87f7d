"""The dynamic tokenizer of Intern-S1: one vocabulary and one range of ids for each scientific domain."""

from lit_interns1.data.dynamic_tokenizer.detectors import Detector, LetterRunDetector, SmilesDetector
from lit_interns1.data.dynamic_tokenizer.files import standard_domain
from lit_interns1.data.dynamic_tokenizer.tokenizer import DomainSpec, DynamicTokenizer, Segment
from lit_interns1.data.dynamic_tokenizer.training import CompressionRatio, compression_ratio, train_vocabulary
from lit_interns1.data.dynamic_tokenizer.vocabulary import DomainVocabulary

__all__ = [
    "CompressionRatio",
    "Detector",
    "DomainSpec",
    "DomainVocabulary",
    "DynamicTokenizer",
    "LetterRunDetector",
    "Segment",
    "SmilesDetector",
    "compression_ratio",
    "standard_domain",
    "train_vocabulary",
]
