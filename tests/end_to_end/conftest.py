"""One real ComfyUI server for all tests here, with this pack as its only custom node and a data folder of its own."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import websocket
from pack.launch.client import TEXT, Client
from pack.launch.server import Server

ROOT = Path(__file__).parents[2]
PREVIEW_IMAGE = 1  # what one of ComfyUI's binary messages carries, by its first four bytes, as TEXT


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The server; previews are on, because its page turns them on as well."""
    comfyui = os.environ.get("COMFYUI_PATH") or pytest.skip("COMFYUI_PATH is not set; run.py test sets it")
    with Server(comfyui, tmp_path_factory.mktemp("output"), ["--preview-method", "latent2rgb"]) as server:
        yield server


@pytest.fixture
def client(server):
    """A client of its own for each test."""
    return Client(server.url, server.check_alive)


@pytest.fixture
def watch(server, client):
    """Function that runs a graph and tells what the page hears: outputs, cached nodes, steps, previews, notices."""

    def run(graph):
        address = f"{server.url.replace('http', 'ws')}/ws?clientId={client.client_id}"
        page = websocket.create_connection(address, timeout=120)
        heard = SimpleNamespace(steps=[], previews=[], notices=[], cached=[])
        try:
            prompt_id = client.queue(graph)
            while True:
                message = page.recv()
                if isinstance(message, bytes):
                    kind = int.from_bytes(message[:4], "big")
                    heard.previews += [message[8:]] if kind == PREVIEW_IMAGE else []
                    heard.notices += [message[8:].decode()] if kind == TEXT else []
                    continue
                event = json.loads(message)
                about = event["data"]
                assert event["type"] not in ("execution_error", "execution_interrupted"), about.get("exception_message")
                if event["type"] == "progress":
                    heard.steps.append((about["value"], about["max"]))
                elif event["type"] == "execution_cached":
                    heard.cached += about["nodes"]
                elif event["type"] == "execution_success":
                    break
        finally:
            page.close()
        heard.outputs = client.outputs(prompt_id)
        return heard

    return run
