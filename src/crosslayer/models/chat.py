"""Examples as the text that the model was made for: through its chat template, or joined plainly where it has none."""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from crosslayer.data.examples import Example
from crosslayer.data.rows import IMAGE_MARK
from crosslayer.errors import UserError

TODAY = "26 Jul 2024"
"""What Llama's templates take for the date; a true one would give other tokens every day."""
STAND_IN = "@response@"
"""Shows what a template puts before and after a response."""


@dataclass(frozen=True)
class Text:
    """What is tokenised."""

    text: str
    response_start: int | None
    """Where in it the response begins; None where there is none."""
    complete: bool
    """Whether it has its special tokens already, from a template."""


def write(processor: Any, example: Example, has_picture: bool) -> Text:
    """The text of an example with its response and the end of that, or up to where the response would begin.

    Raises:
        UserError: when image marks and pictures do not match, or the template refuses the conversation.
    """
    asked = [turn[0] for turn in example.history] + [example.prompt]
    marks = sum(prompt.count(IMAGE_MARK) for prompt in asked)
    if marks > has_picture:
        found = f"prompt {example.id!r}: {marks} {IMAGE_MARK} mark{'s' if marks > 1 else ''} but"
        if has_picture:
            raise UserError(f"{found} 1 image; leave a single mark, where the image goes")
        raise UserError(f"{found} no image; give the image, or leave the mark out")
    if has_picture and not marks:
        asked[0] = IMAGE_MARK + asked[0]
    template = _template(processor) if example.form == "chat" else None
    return _joined(processor, example, asked) if template is None else _templated(processor, template, example, asked)


def _joined(processor: Any, example: Example, asked: list[str]) -> Text:
    """Turns separated by blanks; the end token after the response."""
    turns = [part for prompt, (_, told) in zip(asked, example.history, strict=False) for part in (prompt, told)]
    prompt = " ".join([*turns, asked[-1]]).replace(IMAGE_MARK, _image_text(processor))
    if example.response is None:
        return Text(prompt, None, False)
    end = _tokenizer(processor).eos_token or ""
    return Text(f"{prompt} {example.response}{end}", len(prompt) + 1, False)


def _templated(processor: Any, template: Any, example: Example, asked: list[str]) -> Text:
    """As the template writes it, with whatever it puts before and after a response."""
    inline = template is not processor or not hasattr(processor, "image_processor")
    image = _image_text(processor) if inline else None
    turns = [_message("user", asked[0], image)]
    for (_, told), following in zip(example.history, asked[1:], strict=True):
        turns += [_message("assistant", told, image), _message("user", following, image)]
    try:
        settings = {"tokenize": False, "date_string": TODAY}
        prompt = template.apply_chat_template(turns, add_generation_prompt=True, **settings)
        if example.response is None:
            return Text(prompt, None, True)
        whole = template.apply_chat_template([*turns, _message("assistant", STAND_IN, image)], **settings)
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"prompt {example.id!r}: the chat template refuses it ({error}); add --plain") from None
    lead, _, end = whole.removeprefix(prompt).partition(STAND_IN) if whole.startswith(prompt) else ("", "", "")
    end = end.rstrip() or _tokenizer(processor).eos_token or ""
    return Text(f"{prompt}{lead}{example.response.strip()}{end}", len(prompt + lead), True)


def _template(processor: Any) -> Any:
    """What has a chat template: the processor, or else its tokenizer."""
    owners = (processor, _tokenizer(processor))
    return next((owner for owner in owners if getattr(owner, "chat_template", None)), None)


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def _image_text(processor: Any) -> str:
    """What stands for an image in a text, before the processor makes room for it."""
    return getattr(processor, "boi_token", None) or getattr(processor, "image_token", None) or IMAGE_MARK


def _message(role: str, said: str, image: str | None) -> dict[str, Any]:
    """A turn; its image mark is written as `image`, or is a part of its own where that is None."""
    if image is not None:
        return {"role": role, "content": said.replace(IMAGE_MARK, image)}
    before, mark, after = said.partition(IMAGE_MARK)
    texts = [{"type": "text", "text": text.strip("\n") if mark else text} for text in (before, after)]
    parts = [texts[0], {"type": "image"}, texts[1]] if mark else texts[:1]
    return {"role": role, "content": [part for part in parts if part.get("text") != ""] or texts[:1]}
