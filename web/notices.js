// What our nodes say while they run (variant, number format, what will not fit) stays on them. Newer front ends, 1.58 for
// one, take a node's text away when its job has ended; there it is shown again.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const TEXT = "progress_text"; // the event of nodes/notice.py
const ENDED = ["execution_success", "execution_error", "execution_interrupted"];
const AFTER = 200; // milliseconds in which the front end has taken the texts away
const notices = new Map(); // id -> the node and its last text

function remember({ detail }) {
  const node = app.graph.getNodeById(detail.nodeId);
  if (node?.type.startsWith("HappyHorse")) notices.set(detail.nodeId, { node, text: detail.text });
}

function showAgain() {
  for (const [nodeId, { node, text }] of notices) {
    if (app.graph.getNodeById(nodeId) !== node) continue; // another workflow is open, or the node is gone
    api.dispatchEvent(new CustomEvent(TEXT, { detail: { nodeId, text } }));
  }
}

app.registerExtension({
  name: "happyhorse-local.notices",
  setup() {
    api.addEventListener(TEXT, remember);
    api.addEventListener("execution_error", ({ detail }) => notices.delete(String(detail.node_id))); // it said no more
    for (const event of ENDED) api.addEventListener(event, () => setTimeout(showAgain, AFTER));
  },
});
