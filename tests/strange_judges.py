"""Judges that misbehave in each way that is handled; worker processes load them from here."""

import math
import os
import time

from lit_interns1.rollout.judges import Judgement

ODD = {
    "nothing": None,
    "a number": 1.0,
    "not a number": Judgement(math.nan),
    "infinite": Judgement(math.inf),
    "text": Judgement("1"),
    "too large": Judgement(2.0),
    "correct as text": Judgement(1.0, "yes"),
}


class StrangeJudge:
    """Does what the response says; else the length of the response is the score."""

    score_range = (0.0, 1.5)

    def __init__(self, quick=False):
        self.quick = quick

    def judge(self, prompt, text, sample):
        if text == "raise":
            raise KeyError("no such thing")
        if text == "exit":
            raise SystemExit(3)
        if text == "die":
            os._exit(5)
        if text == "hang":
            while True:
                pass
        if text == "sleep":
            time.sleep(3600)
        if text in ODD:
            return ODD[text]
        return Judgement(len(text) / 10, len(text) > 5)


class ProcessJudge:
    """The score is the process id, so that it can be seen who judged."""

    def judge(self, prompt, text, sample):
        return Judgement(os.getpid())


class GroupJudge:
    """Scores by rank within what it is given."""

    def judge(self, prompt, text, sample):
        return self.judge_batch([prompt], [text], [sample])[0]

    def judge_batch(self, prompts, texts, samples):
        if "hang" in texts:
            time.sleep(3600)
        order = sorted(texts)
        return [ValueError("empty") if not text else Judgement(order.index(text)) for text in texts]


class UnloadableJudge:
    """Can be sent, but not loaded."""

    def __reduce__(self):
        return (_refuse, ())

    def judge(self, prompt, text, sample):
        return Judgement(1.0)


def _refuse():
    raise OSError("the licence server is down")


def of_length(prompt, text, sample):
    """A plain function as a judge."""
    return len(text)
