"""HappyHorse Local: ComfyUI nodes for the HappyHorse-1.0 class of joint video and sound model (daVinci-MagiHuman)."""

WEB_DIRECTORY = "./web"  # the help pages, web/docs/<node id>.md, and the page's script, web/notices.js


async def comfy_entrypoint():
    """Return the extension; ComfyUI awaits this once at start-up, so that importing the folder costs nothing."""
    import logging

    try:
        from .nodes import HappyHorseExtension
    except Exception:
        logging.exception("happyhorse-local could not be loaded")  # ComfyUI itself shows the message alone
        raise
    return HappyHorseExtension()
