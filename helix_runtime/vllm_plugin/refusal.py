"""The one exception with which the plugin refuses to start."""


class HelixRefusal(RuntimeError):
    """A start that Helix refuses; the text quotes the rule, what is allowed, and what to do next.

    Not a ValueError on purpose: vLLM's configuration classes are pydantic dataclasses, which wrap every ValueError
    into a validation report and bury the sentence.
    """
