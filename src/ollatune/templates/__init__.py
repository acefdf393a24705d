"""Floor 2: chat templates, Go and Jinja, rendered as the server renders them."""

from ollatune.templates.chat import ChatTemplate, load_chat_template
from ollatune.templates.messages import Message, Segment, joined
from ollatune.templates.precedence import prefers_jinja
from ollatune.templates.to_go import GoConversion, to_go_template

__all__ = [
    "ChatTemplate",
    "GoConversion",
    "Message",
    "Segment",
    "joined",
    "load_chat_template",
    "prefers_jinja",
    "to_go_template",
]
