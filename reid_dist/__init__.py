"""reid_dist: distributed training of person re-identification models. The config defines the mathematics."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference import FeatureExtractor

__all__ = ["FeatureExtractor"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`from reid_dist import FeatureExtractor` imports torch then, and `import reid_dist` does not."""
    if name == "FeatureExtractor":
        from .inference import FeatureExtractor

        return FeatureExtractor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
