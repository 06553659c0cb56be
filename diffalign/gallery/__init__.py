"""The gallery: what several systems made of the same prompts, on one static page that makes it hard to fool oneself."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.gallery.showing import show as show


def __getattr__(name: str) -> Any:
    if name == "show":  # needs torch, and `diffalign --help` does not
        from diffalign.gallery.showing import show

        return show
    raise AttributeError(f"module 'diffalign.gallery' has no attribute '{name}'")
