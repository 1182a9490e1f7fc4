"""HappyHorse Local: prompt or image to video with sound, on this computer.

    python3 run.py demo ["A red ball bounces on a blue floor"]    make a clip with the built-in tiny model
    python3 run.py comfyui                                        start ComfyUI with these nodes and stay up
    python3 run.py test                                           run every test
    python3 run.py verify DIR                                     compare our networks with golden tensors
    python3 run.py convert SRC DST --dtype int8                   any published layout to one file, smaller
    python3 run.py speed --size 1080p                             how fast your card is, without downloading weights
    python3 run.py train NAME | evaluate | bench | workflows      for developers

`python3 run.py COMMAND --help` says more. The first run makes .venv and fetches ComfyUI (3 GB, a few minutes; 8 GB
with an NVIDIA card); later ones start at once. A ComfyUI of your own is used if this folder lies in its custom_nodes or
beside it, or if COMFYUI_PATH names it; it is read, never changed.
"""

import os
import signal
import subprocess
import sys

from as_package import comfyui_folder
from launch import ROOT, LaunchError, comfyui, demo, environment

TESTED_AT_ONCE = 4  # files of tests; one may take 3 GB


def prepare():
    """Return a ComfyUI's folder once it and .venv are complete; both are made here if they are not."""
    named = os.environ.get("COMFYUI_PATH")
    found = comfyui_folder()
    if named and found is None:
        raise LaunchError(f"COMFYUI_PATH={named} is no ComfyUI folder (comfy/sd.py is missing). Correct or unset it.")
    if found and not why_not_ready(found):
        return found
    with environment.setup_lock():
        found = comfyui_folder()  # another run may have finished meanwhile
        reason = why_not_ready(found) if found else "ComfyUI is not here yet"
        if reason:
            print(f"Setting up .venv and ComfyUI ({reason}); later runs start at once.", flush=True)
            environment.create()
            found = found or comfyui.fetch(environment.python_of())
            environment.install(environment.plan(found, comfyui.version(found)))
    return found


def why_not_ready(folder):
    """Return why .venv cannot run this ComfyUI, in a few words, or None if it can."""
    return environment.why_not_ready(environment.plan(folder, comfyui.version(folder)))


def run(command, folder, **variables):
    """Run a command with .venv's Python and exit as it does; COMFYUI_PATH tells it which ComfyUI to use.

    OpenMP's threads wait asleep: awake, on a computer that does something else too, they take a clip from 1.3 s to 13.
    Into a file or a pipe Windows writes its own code page, in which letters that it lacks become escapes.
    variables: of the environment, where it does not have them.
    """
    command = [str(environment.python_of()), *map(str, command)]
    defaults = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONIOENCODING": ":backslashreplace"}
    variables = {**defaults, **variables, **os.environ, "COMFYUI_PATH": str(folder)}
    if sys.platform != "win32":
        sys.stdout.flush()
        os.execve(command[0], command, variables)  # signals and the exit code then need no passing on
    process = subprocess.Popen(command, env=variables)
    while True:
        try:
            sys.exit(process.wait())
        except KeyboardInterrupt:
            continue  # it has had the same Ctrl-C, and ends in its own way


def run_module(name, words, folder):
    """Run a module of this pack (`nano.evaluate`) with these command-line words."""
    run([ROOT / "as_package.py", name, *words], folder)


def run_demo(words):
    """Make a clip (launch/demo.py)."""
    demo.parser().parse_args(words)  # help and mistakes come before gigabytes
    run_module("launch.demo", words, prepare())


def run_comfyui(words):
    """Start ComfyUI with these nodes and stay up until Ctrl-C; then open http://127.0.0.1:8188 in a browser.

    usage: run.py comfyui [--port N] [--listen [IP]] [any other argument of ComfyUI's main.py]

    --port N       another port than 8188
    --listen [IP]  reachable from other computers too (anyone there can use it: only on networks you trust)
    --cpu          do not use the graphics card

    Settings, inputs and outputs lie in .comfyui/base, and so do models (.comfyui/base/models/diffusion_models,
    text_encoders, vae); the models of a ComfyUI of your own are offered too. README.md tells how to have these nodes
    in your own ComfyUI for good.
    """
    folder = prepare()
    print("ComfyUI will say that comfyui-workflow-templates are missing: hundreds of MB, left out.", flush=True)
    own_models = folder / "models" if folder != comfyui.FETCHED else None
    device = [] if environment.uses_card() or sys.platform == "darwin" or "--cpu" in words else ["--cpu"]
    run([folder / "main.py", *comfyui.make_base(ROOT / ".comfyui" / "base", own_models), *device, *words], folder)


def run_test(words):
    """Run every test, or some: all words go to pytest.

    usage: run.py test [pytest's arguments]

    run.py test tests/launch      one folder
    run.py test -k schedule -x    tests with this word in their name; stop at the first failure

    All of them: some files at a time, each on cores of its own. With arguments: one by one, unless they are -n 2.
    """
    folder = prepare()
    os.chdir(ROOT)
    threads, cores = {}, os.cpu_count() or 1
    if not words:
        at_once = min(cores, TESTED_AT_ONCE)
        words, threads = ["-n", at_once, "--dist", "loadfile"], {"OMP_NUM_THREADS": str(cores // at_once)}
    run(["-m", "pytest", *words], folder, **threads)


def run_verify(words):
    """Compare our networks, tensor by tensor, with a folder of golden tensors; exit code 1 if any differs.

    usage: run.py verify DIR

    DIR holds pairs name.json + name.safetensors (tests/golden is one such folder). One line a tensor: case, tensor,
    largest absolute error, tolerance, ok or FAIL.
    """
    if not words:
        raise LaunchError("verify needs a folder: run.py verify DIR")
    run_module("verify", words, prepare())


def run_convert(words):
    """Write a transformer or text encoder in any published layout as one safetensors file, in bf16, int8 or fp8.

    usage: run.py convert SRC DST --dtype {bf16,int8,fp8} [--variant {distill,base,540p_sr,1080p_sr}] [--force]

    SRC        a file, a shard or a folder of shards
    DST        the .safetensors file to write; it appears once it is complete
    --dtype    of the linear layers; what is sensitive stays as precise as the model needs it
    --variant  where neither SRC nor its name tells which transformer it is
    --force    replace DST if it exists
    """
    run_module("model_loader.convert", words, prepare())


def run_speed(words):
    """Run the whole pipeline in ComfyUI on your card, at full size, and print the seconds of every stage.

    usage: run.py speed [--size {256p,540p,1080p}] [--seconds N] [--weight-dtype W] [--attention A] [--compile]
                        [--folder DIR] [any argument of ComfyUI's main.py, such as --lowvram]

    Nothing is downloaded: the model files are written first, in the full size (27 to 81 GB), of random numbers, which
    a card multiplies as fast as trained ones; the clip is noise. Afterwards they are removed, unless --folder says
    where they are to stay. The second of two runs is what every further clip takes.

    --size          of the finished clip (540p)
    --weight-dtype  as in Load HappyHorse: bf16, int8, int8_fast, fp8_e4m3fn, fp8_e4m3fn_fast (int8)
    --attention     as in HappyHorse Speed: default, fp8, int8, sage, flash
    --compile       as in HappyHorse Speed
    """
    run_module("benchmarks.pipeline", words, prepare())


def run_train(words):
    """Train one part of the built-in tiny model (nano/train_NAME.py; nano/README.md tells what takes how long).

    usage: run.py train NAME [its arguments]        run.py train NAME --help
    """
    names = sorted(path.stem.removeprefix("train_") for path in (ROOT / "nano").glob("train_*.py"))
    if not words or words[0] not in names:
        raise LaunchError(f"train needs the name of a part: {', '.join(names)}")
    run_module(f"nano.train_{words[0]}", words[1:], prepare())


def run_evaluate(words):
    """Measure the built-in tiny model on clips that training has not seen, and print a table.

    usage: run.py evaluate [its arguments]
    """
    run_module("nano.evaluate", words, prepare())


def run_bench(words):
    """Measure kernels, layers and stages, and print and keep a table (benchmarks/README.md explains it).

    usage: run.py bench [its arguments]
    """
    run_module("benchmarks.run", words, prepare())


def run_workflows(words):
    """Write workflows/*.json anew from workflows/api and workflows/notes (launch/workflows.py), for ComfyUI's page.

    usage: run.py workflows
    """
    run_module("launch.workflows", words, prepare())


COMMANDS = {
    "demo": run_demo,
    "comfyui": run_comfyui,
    "test": run_test,
    "verify": run_verify,
    "convert": run_convert,
    "speed": run_speed,
    "train": run_train,
    "evaluate": run_evaluate,
    "bench": run_bench,
    "workflows": run_workflows,
}


def main():
    """Run the command that the command line names."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        sys.exit(f"run.py: there is no command `{name}`; there are: {', '.join(COMMANDS)}")
    if words[:1] in (["-h"], ["--help"]) and name != "demo":  # demo's parser prints its own
        print(COMMANDS[name].__doc__.replace("\n    ", "\n"))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a pip that we started is stopped too
    try:
        COMMANDS[name](words)
    except LaunchError as error:
        sys.exit(f"run.py: {error}")
    except OSError as error:
        sys.exit(f"run.py: {error}. Set-up stopped; once that is put right, run the same command again.")
    except KeyboardInterrupt:
        sys.exit("\nrun.py: stopped. The same command takes up the set-up again.")


if __name__ == "__main__":
    main()
