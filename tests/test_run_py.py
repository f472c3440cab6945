"""run.py is the same text in all five papers: each paper stands alone, and none drifts from the others."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ("shiftresnet", "deepshift", "s3", "shared_bases", "epsilon_resnet")


def test_the_five_copies_are_equal():
    texts = {paper: (ROOT / paper / "run.py").read_bytes() for paper in PAPERS}
    different = [paper for paper, text in texts.items() if text != texts[PAPERS[0]]]
    assert not different, f"copy {PAPERS[0]}/run.py, or the edited one, over the others: {', '.join(different)} differ"
