# shellcheck shell=bash
# SPDX-License-Identifier: MIT
# bash's completion of ksm-wrapper: its options, then the command's own.

_ksm_wrapper()
{
    local cur=${COMP_WORDS[COMP_CWORD]} option='' i

    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            --)
                _command_offset $((i + 1))
                return
                ;;
            --method | --group)
                option=${COMP_WORDS[i]}
                [[ ${COMP_WORDS[++i]} != = ]] || ((i++)) # bash takes --method=auto apart
                ;;
            -*) ;;
            *)
                _command_offset "$i"
                return
                ;;
        esac
    done
    if ((i > COMP_CWORD)); then # the value of that option
        [[ $cur != = ]] || cur=
        case $option in
            --method) option='auto prctl madvise' ;;
            --group) option=$(ksm-wrapper --groups 2>/dev/null | sed 's,.*/,,') ;;
        esac
    elif [[ $cur == -* ]]; then
        option=$(ksm-wrapper --help 2>/dev/null | grep -oe '--[a-z][a-z-]*')
    else
        _command_offset "$i"
        return
    fi
    # shellcheck disable=SC2207 # as it is done in completions: none of these words has a blank
    COMPREPLY=($(compgen -W "$option" -- "$cur"))
} && complete -F _ksm_wrapper ksm-wrapper
