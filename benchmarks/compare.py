"""Compare optimizers on a task: equal steps, gradients or seconds, each at its best learning rate.

python benchmarks/compare.py --output-dir results
python benchmarks/compare.py --output-dir results --task fashion_mnist --budgets 30 60 120 240 480 \
    --rates 0.025 0.05 0.1 --seeds 0 1 2 3 4
python benchmarks/compare.py --output-dir results --task text --batch-size 16 --auxiliary-rate 0.003
"""

from comparing.racing import compete
from comparing.settings import CompareSettings
from comparing.showing import make_figures, make_tables
from comparing.tasks import make_task
from study import Record, Study, Work


def run(settings: CompareSettings, work: Work) -> Record:
    """Reads the data, and lets the methods compete."""
    work.say(f"reading {settings.task}")
    return compete(settings, make_task(settings), work)


EXTENDING = ("budgets", "rates", "seeds", "predict")
STUDY = Study("compare", CompareSettings, run, make_tables, make_figures, EXTENDING)

if __name__ == "__main__":
    STUDY.main()
