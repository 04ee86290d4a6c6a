# shellcheck shell=bash
# SPDX-License-Identifier: MIT
# bash's completion of ksmtool. A line of click's answer is a type and a value; what the type command is:
# python/ksmtool/complete.py.

_ksmtool()
{
    local cur words cword word type value start=0 before=

    _get_comp_words_by_ref -n =: cur words cword
    [[ $cur != --*=* ]] || cur=${cur#*=}
    while IFS=, read -r type value; do
        case $type in
            plain) COMPREPLY+=("$value") ;;
            file) _filedir ;;
            command) before=$((cword - value)) ;;
        esac
    done < <(
        COMP_WORDS="${words[*]:0:cword+1}" COMP_CWORD=$cword _KSMTOOL_COMPLETE=bash_complete ksmtool 2>/dev/null
    )
    [[ $before ]] || return 0
    # What are words to ksmtool is taken apart in COMP_WORDS, at = and :.
    for word in "${words[@]:0:before}"; do
        while [[ $word && $start -lt $COMP_CWORD ]]; do
            word=${word#"${COMP_WORDS[start++]}"}
        done
    done
    _command_offset $start
} && complete -o nosort -F _ksmtool ksmtool
