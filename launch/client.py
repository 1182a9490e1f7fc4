"""Queue a workflow on a ComfyUI server and follow it to its end, over HTTP and a websocket."""

import json
import struct
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass

from . import LaunchError

NOTICE = "notice"  # what we call the event of a node's text
TEXT = 3  # its number among ComfyUI's binary messages (protocol.BinaryEventTypes)


class PromptError(LaunchError):
    """The server refused a workflow; the message names the nodes, their inputs and what is wrong with them."""


class NodeError(LaunchError):
    """A node failed while it ran; the message names it and the reason."""


class Interrupted(LaunchError):
    """The workflow was interrupted before its end."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the running node is: `step` of `steps` (0 of 0 before the node reports any)."""

    node: str
    step: int = 0
    steps: int = 0

    def __str__(self):
        return f"{self.node} {self.step}/{self.steps}" if self.steps else self.node


def node_title(graph, node_id):
    """Return the title of a node of an API workflow, or its class, or its id."""
    node = graph.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type") or f"node {node_id}"


def explain_refusal(reply, graph):
    """Return one readable line per fault of the server's answer (the JSON body of HTTP 400) to `graph`."""
    lines = []
    for node_id, faults in reply.get("node_errors", {}).items():
        for fault in faults.get("errors", []):
            detail = f" ({fault['details']})" if fault.get("details") else ""
            lines.append(f"  {node_title(graph, node_id)} [{node_id}]: {fault.get('message', 'refused')}{detail}")
    error = reply.get("error", {})
    if not isinstance(error, dict):
        error = {"message": str(error)}
    detail = f" ({error['details']})" if error.get("details") and not lines else ""
    return "\n".join([f"ComfyUI refused the workflow: {error.get('message', 'no reason given')}{detail}", *lines])


class Client:
    """A client of one server: queue, follow, interrupt.

    url: "http://host:port". check_alive: called while waiting; raises if there is nothing left to wait for.
    Every method raises LaunchError if the server cannot be reached.
    """

    def __init__(self, url, check_alive=lambda: None):
        self.url, self.check_alive = url, check_alive
        self.client_id = uuid.uuid4().hex

    def request(self, path, body=None):
        """Return the JSON answer to GET, or to POST where there is a `body`; None for an empty answer."""
        payload = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, payload, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise self._broken(error) from error

    def queue(self, graph):
        """Queue an API workflow and return its prompt id; PromptError if the server refuses it."""
        try:
            return self.request("/prompt", {"prompt": graph, "client_id": self.client_id})["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptError(explain_refusal(json.loads(error.read()), graph)) from None

    def interrupt(self, prompt_id):
        """Ask the server to stop this prompt if it is running."""
        self.request("/interrupt", {"prompt_id": prompt_id})

    def run(
        self,
        graph,
        on_progress=lambda progress: None,
        on_queued=lambda prompt_id: None,
        on_notice=lambda node, text: None,
    ):
        """Queue an API workflow, call `on_progress` at least twice a second, return its outputs {node id: {...}}.

        `on_notice(title, text)` gets what a node shows about itself while it runs, remarks from its second line on.
        Raises PromptError if it is refused, NodeError if a node fails, Interrupted if somebody stops it.
        """
        events = self._connect()
        try:
            prompt_id = self.queue(graph)
            on_queued(prompt_id)
            progress = Progress("Waiting")
            while True:
                on_progress(progress)
                self.check_alive()
                kind, about = self._next_event(events)
                if kind == NOTICE:
                    on_notice(node_title(graph, about["node"]), about["text"])
                if about.get("prompt_id") != prompt_id:
                    continue
                if kind == "execution_success":
                    return self.outputs(prompt_id)
                progress = _advance(progress, kind, about, graph)
        finally:
            events.close()

    def outputs(self, prompt_id, patience=10):
        """Return the outputs {node id: {...}} of a finished prompt; its history can lag behind its last message."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            entry = self.request(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return entry["outputs"]
            time.sleep(0.05)
        raise LaunchError(f"ComfyUI finished prompt {prompt_id} but lists no result of it after {patience} s.")

    def _connect(self):
        import websocket  # not in the standard library, so not at the top: run.py reads this file before .venv exists

        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        try:
            events = websocket.create_connection(address, timeout=10)
        except (websocket.WebSocketException, OSError) as error:
            raise self._broken(error) from error
        events.settimeout(0.5)
        return events

    def _next_event(self, events):
        """Return (type, data) of the next message; ("", {}) for a preview picture, or after half a second of none.

        A node's text is (NOTICE, {"node", "text"}): which prompt it belongs to does not stand in it.
        """
        import websocket

        try:
            message = events.recv()
        except websocket.WebSocketTimeoutException:
            return "", {}
        except (websocket.WebSocketException, OSError) as error:
            raise self._broken(error) from error
        if isinstance(message, bytes):
            return _notice(message)
        if not message:
            raise self._broken("it was closed")
        event = json.loads(message)
        return event["type"], event.get("data", {})

    def _broken(self, reason):
        time.sleep(0.5)  # a dying server closes its connections a moment before it has ended
        self.check_alive()
        return LaunchError(f"The connection to ComfyUI at {self.url} failed: {reason}")


def _notice(message):
    """Return the event in a binary message: its kind and the length of the node's id, big-endian, id, text."""
    kind, length = struct.unpack_from(">II", message)
    if kind != TEXT:
        return "", {}
    return NOTICE, {"node": message[8 : 8 + length].decode(), "text": message[8 + length :].decode()}


def _advance(progress, kind, about, graph):
    """Return the Progress after one message; raise if the message says that the workflow has ended badly."""
    if kind == "executing" and about.get("node"):
        return Progress(node_title(graph, about["node"]))
    if kind == "progress":
        return Progress(node_title(graph, about.get("node")), int(about["value"]), int(about["max"]))
    if kind == "execution_interrupted":
        raise Interrupted(f"Interrupted in {node_title(graph, about.get('node_id'))}.")
    if kind == "execution_error":
        reason = f"{about.get('exception_type')}: {about.get('exception_message', '').strip()}"
        raise NodeError(f"{node_title(graph, about.get('node_id'))} failed: {reason}")
    return progress
