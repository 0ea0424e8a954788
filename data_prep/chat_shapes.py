"""Small chats that show what a chat template does; `masks.check_template` masks each of them."""

from typing import Any

Chat = list[dict[str, Any]]

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "name of the city"}},
                "required": ["city"],
            },
        },
    }
]
_CALL_ID = "call00001"  # nine letters and digits, as Mistral's templates demand


def shapes(asked: str = "Which of them", answered: str = "It is the") -> dict[str, tuple[Chat, list[Any] | None]]:
    """Messages and tools by the name of the shape.

    Args:
        asked: beginning of everything that users, system and tools say.
        answered: beginning of everything that the assistant says or thinks.
    """

    def user(text: str) -> dict[str, Any]:
        return {"role": "user", "content": f"{asked} {text}"}

    def assistant(text: str, thinks: str | None = None) -> dict[str, Any]:
        message = {"role": "assistant", "content": f"{answered} {text}"}
        return {**message, "reasoning_content": f"{answered} {thinks}"} if thinks else message

    system = {"role": "system", "content": f"{asked} rules"}
    call = {"type": "function", "id": _CALL_ID, "function": {"name": "get_weather", "arguments": {"city": answered}}}
    tool_chat = [
        user("weather"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "get_weather", "tool_call_id": _CALL_ID, "content": f"{asked} sun"},
        assistant("sun"),
    ]
    return {
        "single turn": ([user("one"), assistant("one")], None),
        "system": ([system, user("one"), assistant("one")], None),
        "multi-turn": ([user("one"), assistant("one"), user("two"), assistant("two")], None),
        "thinking": ([user("one"), assistant("one", "first")], None),
        "multi-turn thinking": (
            [user("one"), assistant("one", "first"), user("two"), assistant("two", "second")],
            None,
        ),
        "tools": (tool_chat, TOOLS),
    }
