"""The demo at a small size: everything it promises to leave behind is there and fits together."""

import json
import re
import sys

import pytest

import crosslayer as xl
from crosslayer import cli


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Output folder of a demo of a few steps on the bundled model."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["crosslayer", "demo", "--out", str(out), "--tokens", "8000", "--prompts", "16"])
        cli.main()
    return out


def test_report_json_holds_every_arm_with_its_figures(demo):
    report = json.loads((demo / "report.json").read_text())
    assert list(report["arms"]) == ["plt", "clt", "clt-next"]
    assert len({arm["tokens"] for arm in report["arms"].values()}) == 1
    for arm in report["arms"].values():
        figure = arm["evaluation"]["top1_agreement"]
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert arm["training_seconds"] > 0
        assert arm["curve"][-1]["tokens"] == arm["probes"][-1]["tokens"] == arm["tokens"]
        assert arm["evaluation"]["verdict"]


def test_report_html_opens_offline(demo):
    page = (demo / "report.html").read_text()
    outside = [url for url in re.findall(r"""(?:src|href)=["']([^"'#]+)""", page) if not url.startswith("data:")]
    assert outside == []
    assert "<script" not in page
    assert page.count("<svg") == 4
    assert page.count("data:image/png;base64,") >= 3


def test_report_shows_what_each_model_says(demo):
    report = json.loads((demo / "report.json").read_text())
    page = (demo / "report.html").read_text()
    for scene in report["captions"]:
        assert scene["original"] in page
        assert set(scene) == {"prompt", "truth", "original", "plt", "clt", "clt-next"}


def test_the_table_shows_the_figures_of_the_json(demo):
    report = json.loads((demo / "report.json").read_text())["arms"]["clt"]
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", (demo / "report.html").read_text().split("</table>")[0])
    width = len(cells) // 4
    clt = {
        name: re.sub("<.*?>", "", cell) for name, cell in zip(cells[:width], cells[2 * width : 3 * width], strict=True)
    }
    assert clt["arm"] == "clt"
    assert clt["l0"] == f"{report['evaluation']['l0']['value']:.1f}"
    assert clt["CE recovered"] == f"{report['evaluation']['cross_entropy_recovered']['value']:.3f}"


@pytest.mark.parametrize(("arm", "span", "first_target"), [("plt", 1, 0), ("clt", 10, 0), ("clt-next", 9, 1)])
def test_finished_arms_are_runs(demo, arm, span, first_target):
    coder = xl.CrossLayerTranscoder.load(demo / arm)
    assert (coder.wiring.span, coder.wiring.first_target) == (span, first_target)
    assert coder.provenance.model_id == "emoji-llava"
    assert coder.provenance.metrics["n_prompts"] == 16


def test_demo_refuses_a_folder_in_use(demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["crosslayer", "demo", "--out", str(demo)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
