"""Text, tokens and packed rows: sources, tokenizers, the one packer, the global order, loaders and the DataModule.

Names are imported when first used: `lit_interns1.data.packing` needs no Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_interns1.data.conversation_data_module import ConversationDataModule
    from lit_interns1.data.conversation_media import ImageTransform, NativeVisuals, RandomAffine, TiledVisuals
    from lit_interns1.data.conversations import ConversationSource
    from lit_interns1.data.loader import EvaluationLoader, ResumableLoader
    from lit_interns1.data.media_tokens import MediaTokens
    from lit_interns1.data.order import RowOrder
    from lit_interns1.data.packed_batch import IGNORED_LABEL, PackedBatch
    from lit_interns1.data.packing import PackingPlan, pack_documents, plan_rows
    from lit_interns1.data.polar_data_module import PolarDataModule
    from lit_interns1.data.polar_lines import PolarSource
    from lit_interns1.data.polar_template import PolarEncoder, PolarTemplate
    from lit_interns1.data.preference_data_module import PreferenceDataModule
    from lit_interns1.data.preferences import PreferenceSource
    from lit_interns1.data.rows import RowReader
    from lit_interns1.data.sources import SourceError, TextSource
    from lit_interns1.data.text_data_module import TextDataModule
    from lit_interns1.data.token_store import TokenStore, open_or_build
    from lit_interns1.data.tokenizer import TextTokenizer, TokenizerError, load_tokenizer

_HOME = {
    "ConversationDataModule": "conversation_data_module",
    "ConversationSource": "conversations",
    "EvaluationLoader": "loader",
    "IGNORED_LABEL": "packed_batch",
    "ImageTransform": "conversation_media",
    "MediaTokens": "media_tokens",
    "NativeVisuals": "conversation_media",
    "PackedBatch": "packed_batch",
    "PackingPlan": "packing",
    "PolarDataModule": "polar_data_module",
    "PolarEncoder": "polar_template",
    "PolarSource": "polar_lines",
    "PolarTemplate": "polar_template",
    "PreferenceDataModule": "preference_data_module",
    "PreferenceSource": "preferences",
    "RandomAffine": "conversation_media",
    "ResumableLoader": "loader",
    "RowOrder": "order",
    "RowReader": "rows",
    "SourceError": "sources",
    "TextDataModule": "text_data_module",
    "TextSource": "sources",
    "TextTokenizer": "tokenizer",
    "TiledVisuals": "conversation_media",
    "TokenStore": "token_store",
    "TokenizerError": "tokenizer",
    "load_tokenizer": "tokenizer",
    "open_or_build": "token_store",
    "pack_documents": "packing",
    "plan_rows": "packing",
}

__all__ = [
    "ConversationDataModule",
    "ConversationSource",
    "EvaluationLoader",
    "IGNORED_LABEL",
    "ImageTransform",
    "MediaTokens",
    "NativeVisuals",
    "PackedBatch",
    "PackingPlan",
    "PolarDataModule",
    "PolarEncoder",
    "PolarSource",
    "PolarTemplate",
    "PreferenceDataModule",
    "PreferenceSource",
    "RandomAffine",
    "ResumableLoader",
    "RowOrder",
    "RowReader",
    "SourceError",
    "TextDataModule",
    "TextSource",
    "TextTokenizer",
    "TiledVisuals",
    "TokenStore",
    "TokenizerError",
    "load_tokenizer",
    "open_or_build",
    "pack_documents",
    "plan_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
