"""The benchmark runs on any machine and writes what it prints; its floors are the specification's arithmetic."""

import pytest
import torch
from pack.benchmarks import attention_rows, growth, measure, quantised, run, stages
from pack.model_loader.attention import joint_attention
from pack.model_loader.tokens import TokenLayout


def test_every_table_of_a_processor(tmp_path, capsys):
    path = run.main(["--cpu", "--out", str(tmp_path)])
    lines = path.read_text().splitlines()
    assert capsys.readouterr().out.splitlines()[:-1] == lines and "GB/s" in lines[2]
    assert [line[3:] for line in lines if line.startswith("## ")] == list(run.PARTS)
    assert "failed" not in path.read_text()
    widths = {}
    for line in lines:
        cells = line.strip("| ").split(" | ")
        if line.startswith("|---"):
            continue
        if line.startswith("|"):
            assert len(cells) == widths.setdefault("now", len(cells))
        else:
            widths.clear()
    ops = {line.split(" | ")[0][2:] for line in lines if line.startswith("| ")}
    assert {"swiglu7 to fp8", "attention_inputs to fp8", "renoise_step fp32", "down", "8 steps", "TurboVAED"} <= ops


def test_one_part_has_a_file_of_its_own(tmp_path):
    path = run.main(["--cpu", "--only", "attention", "--out", str(tmp_path)])
    assert path.name.startswith("attention-") and "## attention" in path.read_text()
    assert "## kernels" not in path.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows a machine without a GPU")
def test_no_gpu_says_what_to_do(capsys):
    with pytest.raises(SystemExit):
        run.main([])
    assert "give --cpu" in capsys.readouterr().err


def test_a_row_that_fails_costs_only_itself():
    def out_of_memory():
        raise RuntimeError("no more\nsecond line")

    assert measure.row_or_fault(("op", "1080p"), out_of_memory) == "| op | 1080p | failed: RuntimeError: no more |"


@pytest.mark.parametrize(
    ("size", "petaflop", "of_attention"), [("256p", 0.81, None), ("540p", 2.98, None), ("1080p", 19.1, 12.0)]
)
def test_floors_are_the_specifications_arithmetic(size, petaflop, of_attention):
    config, steps = stages.STEPS[size]
    parts = [stages.layer_operations(config, layer, attention_rows.CLIPS[size]) for layer in range(40)]
    assert sum(map(sum, parts)) * steps / 1e15 == pytest.approx(petaflop, rel=0.01)
    if of_attention:
        assert sum(attention for _, attention in parts) * steps / 1e15 == pytest.approx(of_attention, rel=0.01)


def test_scores_count_what_local_attention_sees():
    layout, radius = TokenLayout(frames=5, rows=2, columns=3, audio=4, text=2), 1
    frame = torch.arange(30) // 6
    near = ((frame[:, None] - frame[None]).abs() <= radius).sum().item()
    assert attention_rows.scores(layout, radius) == near + 30 * 6 + 6 * 36
    assert attention_rows.scores(layout) == 36 * 36


@pytest.mark.parametrize("radius", [None, 1])
def test_attention_in_fp8_is_measured_on_queries_and_keys_that_are_in_it(radius):
    layout = TokenLayout(frames=5, rows=2, columns=3, audio=4, text=2)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 36, 16, generator=random) for heads in (4, 2, 2))
    found = attention_rows.in_fp8(q, k, layout, radius)(None, None, v)
    error = attention_rows.relative_rms(found, joint_attention(q, k, v, layout, radius))
    assert 0.005 < error < 0.1 and found.shape == q.shape


def test_exponent_of_a_power():
    assert growth.exponent([1, 2, 5, 9], [3 * size**1.7 for size in (1, 2, 5, 9)]) == pytest.approx(1.7)


@pytest.mark.parametrize(
    ("rounded_rows", "error"),
    [(quantised.fp8_rows, (0.02, 0.03)), (quantised.int8_rows, (0.003, 0.01))],  # three bits after the point; 127 steps
)
def test_weights_are_rounded_and_nothing_else(rounded_rows, error):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 48, dtype=torch.bfloat16), torch.nn.Linear(48, 8))
    with torch.inference_mode():
        rounded = quantised.with_rounded_weights(network, rounded_rows)
        wide, narrow = network[0].weight.float(), rounded[0].weight.float()
        assert torch.equal(rounded[0].bias, network[0].bias) and torch.equal(rounded[1].weight, network[1].weight)
        assert error[0] < (narrow - wide).norm() / wide.norm() < error[1]
        assert (narrow - wide).abs().max() <= 0.07 * wide.abs().max()


def test_inputs_are_rounded_to_int8_a_row():
    linear = torch.nn.Linear(64, 48, dtype=torch.bfloat16)
    x = torch.randn(5, 64) * torch.tensor([1e-3, 1, 1, 1, 1e3])[:, None]
    with torch.inference_mode():
        found, exact = quantised.with_int8_inputs(linear)(x.bfloat16()), linear(x.bfloat16())
        error = (found - exact).float().norm(dim=1) / (exact - linear.bias).float().norm(dim=1)
    assert (error > 0.002).all() and (error[1:] < 0.02).all()


def test_an_error_is_that_of_the_worse_stream_in_percent():
    wanted = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    network = lambda video, audio, text: (video, audio)  # noqa: E731
    clip = torch.tensor([3.0, 4.5]), torch.tensor([1.0, 0.2]), None
    assert quantised.errors([network], wanted, clip) == [pytest.approx(20, rel=1e-5)]


def test_the_table_of_roundings_has_nanos_steps_and_every_golden_transformer(tmp_path):
    lines = quantised.main(["--clips", "1", "--out", str(tmp_path)]).read_text().splitlines()
    assert len(lines) == 4 + 8 + 4
    assert all(0 < float(line.split("|")[3].split(",")[0]) < 8 for line in lines[4:12])
