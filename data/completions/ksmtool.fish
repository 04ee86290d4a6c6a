# SPDX-License-Identifier: MIT
# fish's completion of ksmtool. A line of click's answer is a type and a value; what the type command is:
# python/ksmtool/complete.py.

function __ksmtool_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l option (string match -r -- '^--[^=]+=' $current)
    for answer in (env _KSMTOOL_COMPLETE=fish_complete COMP_WORDS=(commandline -cp | string collect) \
            COMP_CWORD=$current ksmtool 2>/dev/null)
        set -l value (string split -m 1 , -- $answer)
        switch $value[1]
            case plain
                printf '%s\n' "$option"$value[2]
            case file
                printf '%s\n' "$option"(__fish_complete_path (string replace -- "$option" '' $current))
            case command
                set -e words[1..(math (count $words) - $value[2])]
                complete --do-complete="$(string join ' ' -- (string escape -- $words) $current)"
        end
    end
end

complete -c ksmtool -f -k -a '(__ksmtool_complete)'
