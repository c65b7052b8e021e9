"""Chat templates in the styles of well-known families, and conversations to render."""

from __future__ import annotations

from typing import Any

__all__ = ["CONVERSATIONS", "LISTS_ONLY", "TEMPLATES", "TOOLS", "TOOL_TEMPLATES"]

TEMPLATES: dict[str, str] = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "default-system": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
        "{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    ),
    "llama3": (
        "{{- bos_token }}\n"
        "{%- if not date_string is defined %}\n"
        "    {%- set date_string = strftime_now('%d %b %Y') %}\n"
        "{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system = messages[0]['content'] | trim %}\n"
        "    {%- set messages = messages[1:] %}\n"
        "{%- else %}{%- set system = '' %}{%- endif %}\n"
        "[system] Today: {{ date_string }}\n\n{{ system }}[end]\n"
        "{%- if tools is not none %}{% for t in tools %}{{ t | tojson(indent=4) }}"
        "{% endfor %}{% endif %}"
        "{%- for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}[end]{% endfor %}"
        "{%- if add_generation_prompt %}{{- '[assistant]\n\n' }}{%- endif %}"
    ),
    "qwen": (
        "{%- if tools %}\n# Tools\n{%- for tool in tools %}\n"
        "{{ tool | tojson }}{%- endfor %}\n{%- endif %}"
        "{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}"
        "{%- for m in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
        "{%- if ns.multi_step and m.role == 'user' %}{%- set ns.multi_step = false %}"
        "{%- set ns.last = index %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{%- if m.content is string %}{%- set c = m.content %}"
        "{%- else %}{%- set c = '' %}{%- endif %}"
        "<|im_start|>{{ m.role }}\n{{ c.split('</think>')[-1].lstrip('\n') }}"
        "<|im_end|>\n{%- endfor %}"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n"
        "{%- if enable_thinking is defined and enable_thinking is false %}"
        "<think></think>{%- endif %}"
        "{%- endif %}"
    ),
    "mistral": (
        "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
        "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}"
        "{{- bos_token }}{%- for m in rest %}"
        "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{- raise_exception('Roles must alternate user and assistant!') }}{%- endif %}"
        "{%- if m.role == 'user' %}[INST] {% if loop.last and system is defined %}"
        "{{ system + '\n\n' }}{% endif %}{{ m.content }} [/INST]"
        "{%- else %} {{ m.content | trim }}{{ eos_token }}{%- endif %}{%- endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}{% endif %}\n{% endfor %}"
    ),
    "loop-controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% if loop.index > 3 %}{% break %}{% endif %}{{ m.role }}={{ m.content }};{% endfor %}"
    ),
    "documents": (
        "{% for d in documents or [] %}<{{ d.title }}: {{ d.text }}>{% endfor %}"
        "{% for m in messages %}{{ m.content }}|{{ m.get('name', 'nobody') }}{% endfor %}"
        "{{ pad_token }}{{ unk_token is defined }}{{ tools is none }}{{ dict(a=1)['a'] }}"
    ),
    "macros": (
        "{% macro turn(m, level=1) %}{{ '#' * level }}{{ m.role | upper }}: {{ m.content }}"
        "{% if m.name %} ({{ m.name }}){% endif %}{% endmacro %}"
        "{% for m in messages %}{{ turn(m, loop.index) }}\n{% endfor %}"
    ),
    "json": "{{ messages | tojson }}{{ tools | tojson(ensure_ascii=True, sort_keys=True) }}",
}

LISTS_ONLY: dict[str, str] = {
    "loop": (
        "{% for m in messages %}{{ m.role }}: {% for part in m['content'] %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
    ),
    "images-first": (
        "{% for m in messages %}{{ m.role }}:"
        "{% for p in m.content | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
        "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p['text'] }}"
        "{% endfor %}\n{% endfor %}"
    ),
    "map-join": (
        "{% for m in messages %}{{ m.role }}:{{ m.content | map(attribute='text') | join }}\n"
        "{% endfor %}"
    ),
    "first-part": "{% for m in messages %}{{ m.role }}:{{ m.content[0].text }}\n{% endfor %}",
    "macro": (
        "{% macro show(parts) %}{% for p in parts %}{{ p['text'] | trim }}{% endfor %}"
        "{% endmacro %}"
        "{% for m in messages %}{{ m.role }}:{{ show(m.content) }}\n{% endfor %}"
    ),
    "refuses-strings": (
        "{% for m in messages %}{% if m.content is string %}"
        "{{ raise_exception('no text') }}{% endif %}"
        "{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %}\n{% endfor %}"
    ),
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "wetter",
            "description": "Wie ist das Wetter? <b>'\"é 你好",
            "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}},
        },
    }
]

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one-turn": [{"role": "user", "content": "Hé 😀 <b>you</b> & {{ 1 }}"}],
    "system": [
        {"role": "system", "content": "  Be terse.\n"},
        {"role": "user", "content": "hi "},
    ],
    "turns": [
        {"role": "user", "content": "2+2?", "name": "ann"},
        {"role": "assistant", "content": "<think>hm</think>\n4 ", "reasoning": "easy"},
        {"role": "user", "content": "and 3+3?", "nothing": None},
    ],
    "wrong-order": [
        {"role": "assistant", "content": "I begin."},
        {"role": "user", "content": "No, I."},
    ],
}

TOOL_TEMPLATES: dict[str, str] = {
    "hermes": (
        "{%- if tools %}<|im_start|>system\n# Tools\n"
        "{%- for tool in tools %}\n{{ tool | tojson }}{%- endfor %}\n"
        "Return calls within <tool_call></tool_call>.<|im_end|>\n{%- endif %}"
        "{%- for m in messages %}"
        "{%- if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
        "</tool_response><|im_end|>\n"
        "{%- elif m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant\n{{ m.content }}"
        "{%- for call in m.tool_calls %}<tool_call>\n"
        "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}\n"
        "</tool_call>{%- endfor %}<|im_end|>\n"
        "{%- else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
    ),
    "llama3": (
        "{%- if tools is defined and tools %}[system]\nEnvironment: ipython\n"
        "{%- for tool in tools %}{{ tool | tojson(indent=4) }}\n{%- endfor %}[end]{%- endif %}"
        "{%- for m in messages %}"
        "{%- if 'tool_calls' in m %}"
        "{%- if m.tool_calls | length != 1 %}"
        "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}"
        "[assistant]\n"
        '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
        "{{ m.tool_calls[0].function.arguments | tojson }}}[end]"
        "{%- elif m.role == 'tool' or m.role == 'ipython' %}"
        "[ipython]\n{{ m.content | tojson }}[end]"
        "{%- else %}[{{ m.role }}]\n{{ m.content | trim }}[end]{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}[assistant]\n{%- endif %}"
    ),
    "mistral": (
        "{{- bos_token }}{%- for m in messages %}"
        "{%- if m.role == 'user' %}"
        "{%- if loop.index0 == 0 and tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}"
        "[/AVAILABLE_TOOLS]{%- endif %}[INST] {{ m.content }}[/INST]"
        "{%- elif m.tool_calls is defined and m.tool_calls %}[TOOL_CALLS] ["
        "{%- for call in m.tool_calls %}"
        "{%- if call.id is not defined or call.id | length != 9 %}"
        "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
        "{%- endif %}"
        "{{ dict(call.function, id=call.id) | tojson }}"
        "{%- endfor %}]{{ eos_token }}"
        "{%- elif m.role == 'tool' %}"
        "{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
        "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
        "{%- endif %}"
        "[TOOL_RESULTS] {{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}"
        "[/TOOL_RESULTS]"
        "{%- else %} {{ m.content }}{{ eos_token }}{%- endif %}{%- endfor %}"
    ),
}
"""Templates that know tools, one for each form in which calls are read."""
