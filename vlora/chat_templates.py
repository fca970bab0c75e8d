"""The text templates of training as Jinja, for programs that render conversations themselves.

Contents are texts. `data_prep.text` stays the one definition; a test holds these equal to it.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from data_prep.text.templates import VICUNA_SYSTEM

_QA = """
{%- for turn in messages -%}
{%- if turn.role == 'system' -%}{{ turn.content + '\\n' }}
{%- elif turn.role == 'user' -%}{%- if turn.content -%}{{ 'Question: ' + turn.content + '\\nAnswer:' }}{%- endif -%}
{%- else -%}{{ ' ' + turn.content + eos_token }}{%- endif -%}
{%- endfor -%}
"""
_BARE = """
{%- set asked = namespace(before=false) -%}
{%- for turn in messages -%}
{%- if turn.role == 'system' -%}{{ turn.content + '\\n' }}
{%- elif turn.role == 'user' -%}
{%- if turn.content -%}{{ ('\\n' if asked.before else '') + turn.content }}{%- endif -%}
{%- set asked.before = true -%}
{%- else -%}{{ ' ' + turn.content + eos_token }}{%- endif -%}
{%- endfor -%}
"""
_VICUNA = """
{%- if messages[0].role != 'system' -%}{{ SYSTEM + ' ' }}{%- endif -%}
{%- for turn in messages -%}
{%- if turn.role == 'system' -%}{{ turn.content + ' ' }}
{%- elif turn.role == 'user' -%}{{ 'USER: ' + (turn.content + ' ' if turn.content else '') + 'ASSISTANT:' }}
{%- else -%}{{ ' ' + turn.content + eos_token }}{%- endif -%}
{%- endfor -%}
"""
_LLAMA2 = """
{%- set start = namespace(system='') -%}
{%- for turn in messages -%}
{%- if turn.role == 'system' -%}
{%- if turn.content -%}{%- set start.system = '<<SYS>>\\n' + turn.content + '\\n<</SYS>>\\n\\n' -%}{%- endif -%}
{%- elif turn.role == 'user' -%}{{ '<s>[INST] ' + start.system + turn.content + ' [/INST]' }}
{%- set start.system = '' -%}
{%- else -%}{{ ' ' + turn.content + ' </s>' }}{%- endif -%}
{%- endfor -%}
"""
_LLAMA3 = """
{{- '<|begin_of_text|>' -}}
{%- for turn in messages -%}
{{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' + turn.content + '<|eot_id|>' -}}
{%- endfor -%}
{%- if messages[-1].role != 'assistant' -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
_PLAIN = """
{%- for turn in messages -%}{%- if turn.role == 'assistant' -%}{{ turn.content + eos_token }}{%- endif -%}{%- endfor -%}
"""
JINJA = {
    "plain": _PLAIN,
    "qa": _QA,
    "bare": _BARE,
    "vicuna_v1": _VICUNA.replace("SYSTEM", repr(VICUNA_SYSTEM)),
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
}


def chat_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Jinja form of a text template; that of `chat` is the tokenizer's own."""
    return tokenizer.chat_template if template == "chat" else JINJA.get(template, "").strip() or None
