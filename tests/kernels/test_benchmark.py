"""The benchmark runs on any machine and writes what it prints."""

import pytest
import torch
from pack.benchmarks import run


def test_the_table_of_a_processor(tmp_path, capsys):
    path = run.main(["--cpu", "--out", str(tmp_path)])
    lines = path.read_text().splitlines()
    assert capsys.readouterr().out.splitlines()[:-1] == lines and "GB/s" in lines[0]
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert cells[0][0] == "op" and {row[0] for row in cells[2:]} == {"rms_norm_spans", "swiglu7"}
    for row in cells[2:]:
        assert len(row) == len(cells[0]) and row[3] == "-" and float(row[4]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows a machine without a GPU")
def test_no_gpu_says_what_to_do(capsys):
    with pytest.raises(SystemExit):
        run.main([])
    assert "give --cpu" in capsys.readouterr().err
