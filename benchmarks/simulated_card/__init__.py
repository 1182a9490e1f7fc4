"""A card that is not there: ComfyUI, its memory management and this pack as on an NVIDIA card, at any size."""
