# SPDX-License-Identifier: MIT
# fish's completion of ksm-wrapper: its options, then the command's own.

# Prints the command's words before this one.
function __ksm_wrapper_words
    set -l words (commandline -opc)
    set -e words[1]
    while set -q words[1]
        switch $words[1]
            case --
                set -e words[1]
                break
            case --method --group
                set -e words[1..2]
            case '-*'
                set -e words[1]
            case '*'
                break
        end
    end
    set -q words[1]; and string escape -- $words
end

complete -c ksm-wrapper -x -a '(complete --do-complete="$(string join " " -- (__ksm_wrapper_words) (commandline -ct))")'
set -l option complete -c ksm-wrapper -n 'test (count (__ksm_wrapper_words)) = 0' -l
$option method -x -a 'auto prctl madvise' -d 'How to opt in'
$option no-preload -d 'Leave LD_PRELOAD alone'
$option group -x -a '(ksm-wrapper --groups 2>/dev/null | string replace -r ".*/" "")' -d 'Memory layout and hash seeds of a group'
$option group-required -d 'Do not run without the layout'
$option no-hash-seed -d 'Leave hash seeds alone'
$option follow -d 'What the command starts joins the group'
$option members -d 'Print the PIDs of the group'
$option groups -d 'Print the files of the groups'
$option show -d 'Print the method and LD_PRELOAD'
$option probe -d 'Print what this kernel can'
$option help -d 'Print a summary'
$option version -d 'Print the version'
