"""What the server says reaches the user as a sentence that names node and reason."""

import pytest
from pack.launch import LaunchError
from pack.launch.client import Client, Interrupted, NodeError, Progress, _advance, _notice, explain_refusal
from pack.launch.server import free_port

GRAPH = {
    "7": {"class_type": "HappyHorseEmptyLatent", "inputs": {"seconds": 99}, "_meta": {"title": "Size and length"}},
    "8": {"class_type": "HappyHorseSampler", "inputs": {}},
}


def test_refusal_names_node_and_reason():
    too_big = {"type": "value_bigger_than_max", "message": "Value 99 bigger than max of 15", "details": "seconds"}
    missing = {"type": "required_input_missing", "message": "Required input is missing", "details": "model"}
    reply = {
        "error": {"message": "Prompt outputs failed validation", "details": ""},
        "node_errors": {"7": {"errors": [too_big]}, "8": {"errors": [missing]}},
    }
    assert explain_refusal(reply, GRAPH).splitlines() == [
        "ComfyUI refused the workflow: Prompt outputs failed validation",
        "  Size and length [7]: Value 99 bigger than max of 15 (seconds)",
        "  HappyHorseSampler [8]: Required input is missing (model)",
    ]


def test_refusal_without_node_errors():
    reply = {"error": {"message": "Node 'Nope' not found.", "details": "Node ID '#1'"}, "node_errors": {}}
    assert explain_refusal(reply, {}) == "ComfyUI refused the workflow: Node 'Nope' not found. (Node ID '#1')"
    assert explain_refusal({"error": "no prompt"}, {}) == "ComfyUI refused the workflow: no prompt"


def test_progress_reads_as_node_and_step():
    progress = _advance(Progress("Waiting"), "executing", {"node": "8"}, GRAPH)
    assert str(progress) == "HappyHorseSampler"
    progress = _advance(progress, "progress", {"node": "8", "value": 3, "max": 8}, GRAPH)
    assert str(progress) == "HappyHorseSampler 3/8"
    assert _advance(progress, "status", {}, GRAPH) == progress


def test_bad_ends_are_errors():
    with pytest.raises(Interrupted, match="Size and length"):
        _advance(Progress(""), "execution_interrupted", {"node_id": "7"}, GRAPH)
    about = {"node_id": "8", "exception_type": "ValueError", "exception_message": "text is too long\n"}
    with pytest.raises(NodeError, match="^HappyHorseSampler failed: ValueError: text is too long$"):
        _advance(Progress(""), "execution_error", about, GRAPH)


def test_a_nodes_text_is_told_from_a_preview():
    message = b"\0\0\0\3" + b"\0\0\0\2" + b"12" + "9 of 640 tokens\nToo short: größer".encode()
    assert _notice(message) == ("notice", {"node": "12", "text": "9 of 640 tokens\nToo short: größer"})
    assert _notice(b"\0\0\0\1" + message[4:]) == ("", {})


def test_server_that_is_not_there():
    client = Client(f"http://127.0.0.1:{free_port()}")
    for call in (lambda: client.request("/system_stats"), lambda: client.run(GRAPH)):
        with pytest.raises(LaunchError, match="connection to ComfyUI"):
            call()
