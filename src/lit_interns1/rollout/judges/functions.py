"""Reward functions and bootcamps of others as judges.

FunctionJudge           f(prompt, text, sample) → number, True/False or Judgement
                        f(prompts, completions, **columns) → list of numbers        as TRL's trainers call them
InternBootcampJudge     verify_score(text, identity) of InternLM/InternBootcamp
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from lit_interns1.rollout.judges.answers import reference
from lit_interns1.rollout.judges.base import Judge, Judgement
from lit_interns1.rollout.samples import Prompt, Sample


def imported(path: str) -> Any:
    """What a dotted path names: "package.module.name" or "package.module:name".

    Raises:
        ValueError: If there is no such thing; the message says which part is missing.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module:
        raise ValueError(f"{path!r} must look like package.module.name")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path!r}: there is no module {error.name!r}") from error
    except AttributeError:
        raise ValueError(f"{path!r}: {module!r} has no {name!r}") from None


class FunctionJudge(Judge):
    """A function as a judge. True and False also say whether a response is correct.

    A function with the parameters `prompts` and `completions` is called as TRL calls it: once per group, with lists of
    texts, `completion_ids`, and every field of the prompts' data as a list of its own, as far as it takes them. None
    from it is a failure, so that `required: false` has TRL's meaning of None: no say about this sample.

    Args:
        function: The function, or its dotted path.
        score_range: (low, high); scores outside are failures.
        quick: Whether it always returns soon, so that it can run in this process, without a timeout.
        conversational: Whether TRL's form has lists of messages in place of texts.

    Raises:
        ValueError: If there is no such function, or its parameters fit neither form.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        score_range: tuple[float, float] | None = None,
        quick: bool = False,
        conversational: bool = False,
    ) -> None:
        self.function: Callable[..., Any] = imported(function) if isinstance(function, str) else function
        if not callable(self.function):
            raise ValueError(f"function = {function!r} is not callable")
        self.name = function if isinstance(function, str) else getattr(function, "__qualname__", repr(function))
        self.score_range, self.quick, self.conversational = score_range, quick, conversational
        parameters = inspect.signature(self.function).parameters
        self.of_groups = "completions" in parameters
        if not self.of_groups and len(parameters) != 3:
            raise ValueError(
                f"function {self.name}({', '.join(parameters)}): it must take (prompt, text, sample), or (prompts, "
                "completions, **columns)"
            )
        everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._takes = None if everything else frozenset(parameters)

    def judge(self, prompt: Prompt, text: str, sample: Sample) -> Judgement:
        """See `Judge`."""
        if self.of_groups:
            return self._judge_group([prompt], [text], [sample])[0]
        return _as_judgement(self.function(prompt, text, sample))

    @property
    def judge_batch(self) -> Callable[..., list[Any]]:
        """See `Judge`; functions of TRL's form alone have it."""
        if not self.of_groups:
            raise AttributeError("judge_batch")
        return self._judge_group

    def _judge_group(self, prompts: Sequence[Prompt], texts: Sequence[str], samples: Sequence[Sample]) -> list[Any]:
        fields = {name for prompt in prompts for name in prompt.data}
        columns: dict[str, list[Any]] = {name: [prompt.data.get(name) for prompt in prompts] for name in sorted(fields)}
        columns |= {
            "prompts": [self._messages("user", prompt.text) for prompt in prompts],
            "completions": [self._messages("assistant", text) for text in texts],
            "completion_ids": [sample.response_ids for sample in samples],
        }
        if self._takes is not None:
            columns = {name: column for name, column in columns.items() if name in self._takes}
        return [_as_judgement(value) for value in self.function(**columns)]

    def _messages(self, role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if self.conversational else text


def _as_judgement(value: Any) -> Any:
    """Numbers as judgements; what is neither is found out by who asked."""
    if isinstance(value, bool):
        return Judgement(float(value), value)
    if isinstance(value, int | float) or (hasattr(value, "item") and getattr(value, "ndim", None) == 0):
        return Judgement(float(value))
    return value


class InternBootcampJudge(Judge):
    """Answers to the cases of a bootcamp of InternLM/InternBootcamp, or of anything with the same `verify_score`.

    Two defaults of `verify_score` give 0 to right answers and are off here: `short_penalty` (texts below 100
    characters) and `format_penalty` (texts without `</think>`). It also swallows the errors of its own code and gives
    0, so a broken bootcamp looks like wrong answers; that cannot be seen from outside.

    Args:
        bootcamp: The bootcamp, its class, or the dotted path of either. The package is not on an index: install it from
            its repository.
        options: What the class is made with.
        field: Of the prompt's data: the identity of the case, as `case_generator` gave it.
        short_penalty: See above.
        format_penalty: See above.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If it has no `verify_score`.
    """

    def __init__(
        self,
        bootcamp: Any,
        options: dict[str, Any] | None = None,
        field: str = "identity",
        short_penalty: bool = False,
        format_penalty: bool = False,
    ) -> None:
        try:
            found = imported(bootcamp) if isinstance(bootcamp, str) else bootcamp
        except ValueError as error:
            if str(bootcamp).startswith("internbootcamp.") and isinstance(error.__cause__, ModuleNotFoundError):
                raise ImportError(
                    f"{bootcamp}: internbootcamp is not installed; clone https://github.com/InternLM/InternBootcamp "
                    "and pip install it"
                ) from None
            raise
        self.bootcamp = found(**(options or {})) if isinstance(found, type) else found
        self.field = field
        verify = getattr(self.bootcamp, "verify_score", None)
        if not callable(verify):
            raise ValueError(f"bootcamp = {bootcamp!r} has no verify_score")
        wanted = {"short_penalty": short_penalty, "format_penalty": format_penalty}
        parameters = inspect.signature(verify).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            self._penalties = wanted
        else:  # classes that override it may not know them
            self._penalties = {name: value for name, value in wanted.items() if name in parameters}

    def judge(self, prompt: Prompt, text: str, sample: Sample) -> Judgement:
        """See `Judge`."""
        score = self.bootcamp.verify_score(text, reference(prompt, self.field), **self._penalties)
        return Judgement(score, bool(score >= 1.0))
