"""Train MEND's editor once; from then on an edit costs one pass there and back.

python examples/train_mend.py [STEPS] [FILE]; by default 400 steps of 16 cases. Stopped, it goes on where it was when it
is started again. `errata train mend --out mend.safetensors` trains longer, on more facts.
"""

import sys

import errata
from errata.train import Course

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
file = sys.argv[2] if len(sys.argv) > 2 else "mend.safetensors"

lm = errata.load("almanac")
cases = errata.data.load("counterfact-mini", part="train")  # never those that it is judged by below
course = Course(steps=steps, batch=min(16, 4 + steps), every=min(50, steps), held=min(64, 4 + steps))


def tell(step: int, losses: dict[str, float], held: bool) -> None:
    if held:
        print(f"step {step}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))


editor = errata.MEND.preset(lm).train(lm, cases, course, out=file, progress=tell)
print(f"the best of {len(editor.about['training']['losses'])} looks at the validation part is in {file}")

mend = errata.MEND.preset(lm, editor=file)
print(errata.bench.run(mend, lm, errata.data.load("counterfact-mini", n=min(40, steps))))
