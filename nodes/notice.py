"""Text on a node while it runs, and in ComfyUI's log: what a user should know and the run survives."""

import logging
import sys


def notice(node, message):
    """Show `message` on the running node, whose schema lists io.Hidden.unique_id, and log it under the node's name.

    Its first line says what the node does, every other one what its user should mind. The page keeps the text until the
    node sends another, so a node that may warn says something at every run. The log is for those without a page:
    workflows queued by a program.
    """
    name, (done, *remarks) = node.define_schema().display_name, message.splitlines()
    logging.info("%s: %s", name, done)
    for remark in remarks:
        logging.warning("%s: %s", name, remark)
    prompt_server = getattr(sys.modules.get("server"), "PromptServer", None)
    if hasattr(prompt_server, "instance"):
        prompt_server.instance.send_progress_text(message, node.hidden.unique_id)
