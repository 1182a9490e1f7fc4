"""Text on a node while it runs: what a user should know and the run survives."""

import sys


def notice(node, message):
    """Show `message` on the running node, whose schema lists io.Hidden.unique_id; without a server there is no page.

    The page keeps the text until the node sends another, so a node that may warn says something at every run.
    """
    prompt_server = getattr(sys.modules.get("server"), "PromptServer", None)
    if hasattr(prompt_server, "instance"):
        prompt_server.instance.send_progress_text(message, node.hidden.unique_id)
