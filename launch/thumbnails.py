"""Pictures of the full-size templates for ComfyUI's template browser: the name, and the graph drawn small.

What the full-size models make cannot be shown by a repository that has none of them; nano's templates carry frames of
nano's own clips (nano/contact_sheet.py).
"""

from PIL import Image, ImageDraw, ImageFont

SIDE = 384  # pixels of the square picture
MARGIN = 20
BADGE = 40  # rows at the top in which newer front ends write over the picture, in its left half
BACKGROUND, NODE, NODE_TITLE, TEXT = (30, 31, 36), (58, 60, 70), (92, 96, 112), (240, 240, 240)
WIRES = {  # type -> colour, near those of ComfyUI's page
    "MODEL": (179, 157, 219),
    "CLIP": (255, 213, 0),
    "VAE": (255, 110, 110),
    "CONDITIONING": (255, 169, 49),
    "LATENT": (255, 156, 249),
    "IMAGE": (100, 181, 246),
    "AUDIO": (129, 199, 132),
}
OTHER_WIRE = (160, 160, 160)
FINER = 3  # drawn this much larger, then reduced: smooth lines


def thumbnail(name, graph):
    """Return the PIL image, 384x384, of a template: `name` as its file is called, `graph` as the page opens it."""
    picture = Image.new("RGB", (SIDE * FINER, SIDE * FINER), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    bottom = _write_title(draw, name.replace("_", " ").capitalize())
    _draw_graph(draw, graph, bottom)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _write_title(draw, title):
    """Write the title in as many lines as it needs; return the row below it."""
    font = ImageFont.load_default(40 * FINER)
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) > (SIDE - 2 * MARGIN) * FINER and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    text = "\n".join(lines)
    corner = MARGIN * FINER, BADGE * FINER
    draw.multiline_text(corner, text, TEXT, font, spacing=8 * FINER)
    return draw.multiline_textbbox(corner, text, font, spacing=8 * FINER)[3]


def _draw_graph(draw, graph, top):
    """Draw nodes and wires, without the note, into what is left below row `top`."""
    nodes = {node["id"]: node for node in graph["nodes"] if node["type"] != "MarkdownNote"}
    boxes = {
        id: (*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
        for id, node in nodes.items()
    }
    left, upper = (min(box[axis] for box in boxes.values()) for axis in (0, 1))
    right, lower = (max(box[axis] for box in boxes.values()) for axis in (2, 3))
    room = (SIDE - 2 * MARGIN) * FINER, SIDE * FINER - top - 2 * MARGIN * FINER
    across, down = room[0] / (right - left), min(room[1] / (lower - upper), 3 * room[0] / (right - left))
    start = top + MARGIN * FINER + (room[1] - down * (lower - upper)) / 2

    def at(x, y):
        return MARGIN * FINER + (x - left) * across, start + (y - upper) * down

    for _, source, out_slot, target, in_slot, kind in graph["links"]:
        begin = at(boxes[source][2], boxes[source][1] + 40 + 28 * out_slot)
        end = at(boxes[target][0], boxes[target][1] + 40 + 28 * in_slot)
        draw.line([begin, end], WIRES.get(kind, OTHER_WIRE), 2 * FINER)
    for box in boxes.values():
        corners = [at(*box[:2]), at(*box[2:])]
        draw.rounded_rectangle(corners, 4 * FINER, NODE)
        head = [corners[0], (corners[1][0], corners[0][1] + 7 * FINER)]
        draw.rounded_rectangle(head, 3 * FINER, NODE_TITLE)
