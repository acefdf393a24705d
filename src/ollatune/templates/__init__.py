"""Floor 2: chat templates, Go and Jinja, rendered as the server renders them."""

from ollatune.templates.chat import ChatTemplate, load_chat_template
from ollatune.templates.messages import Message, Segment, joined

__all__ = ["ChatTemplate", "Message", "Segment", "joined", "load_chat_template"]
