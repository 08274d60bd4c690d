# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Completion for bash. Commands and options are read from virtctl's own help, so they are always those of the installed
# version; names come from the daemon, if it answers within a second.

_virtctl() {
    local word=${COMP_WORDS[COMP_CWORD]} command="" index
    COMPREPLY=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        [[ ${COMP_WORDS[index]} == -* ]] || {
            command=${COMP_WORDS[index]}
            break
        }
    done

    if [[ -z $command && $word != -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$(virtctl --help 2>/dev/null | sed -n 's/^  \([a-z]\+\) .*/\1/p')" -- "$word")
        return
    fi
    if [[ $word == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$(virtctl $command --help 2>/dev/null | grep -oE '(^|[ ,[])--?[a-z][a-z-]*' | tr -d ' ,[')" -- "$word")
        return
    fi
    case $command in
    define)
        compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -f -- "$word")
        ;;
    list | status | reload) ;;
    *)
        mapfile -t COMPREPLY < <(compgen -W "$(virtctl list --no-legend --daemon-timeout=1 2>/dev/null | sed 's/^[^A-Za-z0-9_]*//; s/ .*//')" -- "$word")
        ;;
    esac
}
complete -F _virtctl virtctl
