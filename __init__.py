"""HappyHorse local: ComfyUI nodes for the HappyHorse-1.0 class of joint video and sound model (daVinci-MagiHuman weights)."""


async def comfy_entrypoint():
    """Return the extension; ComfyUI awaits this once at start-up, so that importing the folder costs nothing."""
    from .nodes import HappyHorseExtension

    return HappyHorseExtension()
