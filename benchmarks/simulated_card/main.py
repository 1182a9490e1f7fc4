"""Run ComfyUI's main.py with the simulated card in place: COMFYUI_PATH says where it is, the arguments are its own.

    COMFYUI_PATH=... python benchmarks/simulated_card/main.py --card-gib 12 [--card-without-numbers] [...]

--card-built names the folder of `card.build`; --card-report a file to which each node's use of the card is appended.
"""

import argparse
import json
import os
import runpy
import sys
import threading
import time
from pathlib import Path


def report_nodes(driver, report):
    """Append a line of JSON for every node that ComfyUI runs: its name, seconds, and bytes.

    The bytes are those on the card at most ("peak"), those that stay there ("after"), and those "moved" there.
    """
    while not hasattr(sys.modules.get("execution"), "get_output_data"):
        time.sleep(0.05)
    execution = sys.modules["execution"]
    run = execution.get_output_data

    async def measured(prompt_id, unique_id, node, *arguments, **options):
        driver.card_reset_peak()
        moved, start = driver.card_moved(), time.monotonic()
        try:
            return await run(prompt_id, unique_id, node, *arguments, **options)
        finally:
            line = {"node": type(node).__name__, "peak": driver.card_peak(), "after": driver.card_used()}
            line |= {"moved": driver.card_moved() - moved, "seconds": round(time.monotonic() - start, 2)}
            with report.open("a") as file:
                file.write(json.dumps(line) + "\n")

    execution.get_output_data = measured


def main():
    """Take our own arguments, and --cpu, from the command line; put the card in; become ComfyUI."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--card-gib", type=float, default=24.0)
    parser.add_argument("--card-without-numbers", action="store_true")
    parser.add_argument("--card-built", type=Path, required=True)
    parser.add_argument("--card-report", type=Path)
    ours, theirs = parser.parse_known_args()
    sys.path[0] = str(Path(__file__).parent)
    import card

    driver = card.put_in(ours.card_built, ours.card_gib, not ours.card_without_numbers)
    if ours.card_report:
        threading.Thread(target=report_nodes, args=(driver, ours.card_report), daemon=True).start()
    comfyui = os.environ["COMFYUI_PATH"]
    sys.path[0] = comfyui
    sys.argv = [os.path.join(comfyui, "main.py"), *(word for word in theirs if word != "--cpu")]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
