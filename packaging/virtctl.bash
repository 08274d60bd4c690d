# SPDX-License-Identifier: LGPL-2.1-or-later
# Completion of virtctl for bash. The names of domains are asked of the daemon, the rest is written down here; a unit
# test holds it against what virtctl --help says.

_virtctl_domains() {
    # Not for long: a TAB must not hang.
    timeout 2 virtctl list --no-legend "$@" 2>/dev/null | while read -r name _; do
        printf '%s\n' "$name"
    done
}

_virtctl_networks() {
    timeout 2 virtctl network list --no-legend "$@" 2>/dev/null | while read -r name _; do
        printf '%s\n' "$name"
    done
}

# `virtctl network ...`; the variables are _virtctl's.
_virtctl_network() {
    case $second in
        list) options='--active --no-legend --json' ;;
        info | dump) options='--json' ;;
        leases) options='--no-legend --json' ;;
        stop) options='--force' ;;
        define) options='--check' ;;
        autostart) options='--disable' ;;
        *) options='' ;;
    esac
    if [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options $common" -- "$current")
        return
    fi
    case $second in
        '')
            mapfile -t COMPREPLY < <(compgen -W 'list info leases start stop define undefine dump autostart' -- "$current")
            ;;
        define)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -W default -- "$current"; compgen -f -- "$current")
            ;;
        stop) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_networks --active)" -- "$current") ;;
        *) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_networks)" -- "$current") ;;
    esac
}

_virtctl_containers() {
    timeout 2 virtctl container list --no-legend "$@" 2>/dev/null | while read -r name _; do
        printf '%s\n' "$name"
    done
}

# `virtctl container ...`; the variables are _virtctl's.
_virtctl_container() {
    case $second in
        list) options='--all --running --state --no-legend --json' ;;
        info | dump) options='--json' ;;
        shutdown) options='--timeout --no-wait' ;;
        reboot) options='--timeout' ;;
        kill) options='--signal' ;;
        wait) options='--state --timeout --json' ;;
        console) options='--force --read-only --lines --escape --timeout' ;;
        log) options='--follow --lines --qemu --stderr --json' ;;
        exec) options='--terminal --no-terminal --env' ;;
        create) options='--image' ;;
        define) options='--check' ;;
        autostart) options='--disable' ;;
        *) options='' ;;
    esac
    if [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options $common" -- "$current")
        return
    fi
    case $second in
        '')
            mapfile -t COMPREPLY < <(compgen -W 'list info start shutdown stop kill reboot freeze thaw wait console
                log exec create define undefine dump autostart' -- "$current")
            ;;
        define)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            ;;
        start) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_containers --state stopped,crashed)" -- "$current") ;;
        thaw) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_containers --state paused)" -- "$current") ;;
        shutdown | stop | kill | reboot | freeze | console | exec)
            mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_containers --running)" -- "$current")
            ;;
        *) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_containers)" -- "$current") ;;
    esac
}

_virtctl_pools() {
    timeout 2 virtctl pool list --no-legend 2>/dev/null | while read -r name state _; do
        [[ -z ${1-} || $state == "$1" ]] && printf '%s\n' "$name"
    done
}

_virtctl_volumes() {
    timeout 2 virtctl volume list --no-legend "$1" 2>/dev/null | while read -r name _; do
        printf '%s\n' "$name"
    done
}

_virtctl_jobs() {
    timeout 2 virtctl volume jobs --no-legend 2>/dev/null | while read -r name state _; do
        [[ $state == running || $state == waiting ]] && printf '%s\n' "$name"
    done
}

# `virtctl pool ...`; the variables are _virtctl's.
_virtctl_pool() {
    case $second in
        list) options='--no-legend --json' ;;
        info | dump) options='--json' ;;
        define) options='--check' ;;
        autostart) options='--disable' ;;
        *) options='' ;;
    esac
    if [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options $common" -- "$current")
        return
    fi
    case $second in
        '')
            mapfile -t COMPREPLY < <(compgen -W 'list info start stop refresh build define undefine dump
                autostart' -- "$current")
            ;;
        list) ;;
        define)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            ;;
        start | build) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_pools inactive)" -- "$current") ;;
        stop | refresh) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_pools active)" -- "$current") ;;
        *) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_pools)" -- "$current") ;;
    esac
}

# `virtctl volume ...`; the variables are _virtctl's, among them the names that were given after the verb.
_virtctl_volume() {
    case ${equals:-$previous} in
        --format)
            mapfile -t COMPREPLY < <(compgen -W 'raw qcow2' -- "$current")
            return
            ;;
        --from)
            mapfile -t COMPREPLY < <(compgen -W 'raw qcow2 vmdk vdi vhdx vpc' -- "$current")
            return
            ;;
        --preallocation)
            mapfile -t COMPREPLY < <(compgen -W 'off metadata falloc full' -- "$current")
            return
            ;;
        --to-pool | --backing-pool)
            mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_pools active)" -- "$current")
            return
            ;;
        --backing)
            mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_volumes "${given[0]-}")" -- "$current")
            return
            ;;
        --size) return ;;
    esac
    case $second in
        list | snapshots | jobs) options='--no-legend --json' ;;
        info) options='--json' ;;
        create) options='--format --preallocation --backing --backing-pool' ;;
        clone) options='--to-pool' ;;
        import) options='--from --probe --format' ;;
        upload) options='--format --size --resume' ;;
        download) options='--force --resume' ;;
        resize) options='--shrink' ;;
        *) options='' ;;
    esac
    if [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options $common" -- "$current")
        return
    fi
    case $second,${#given[@]} in
        ,*)
            mapfile -t COMPREPLY < <(compgen -W 'list info snapshots create clone import upload download resize wipe
                delete jobs wait cancel' -- "$current")
            ;;
        jobs,*) ;;
        wait,0 | cancel,*) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_jobs)" -- "$current") ;;
        *,0) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_pools active)" -- "$current") ;;
        info,1 | snapshots,1 | clone,1 | import,1 | download,1 | resize,1 | wipe,1 | delete,*)
            mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_volumes "${given[0]}")" -- "$current")
            ;;
        import,2 | upload,2 | download,2)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            ;;
    esac
}

_virtctl() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} command='' second='' word skip=0 options
    local -r commands='list info start shutdown stop kill reboot suspend resume wait console log
        define undefine dump autostart status fsck slots reload container network pool volume help'
    local -r common='--help --daemon-timeout --address'
    local -r with_value='--address --env -e --image --daemon-timeout --escape --lines -n --signal -s --state --timeout
        --backing --backing-pool --format --from --preallocation --size --to-pool'
    local -a given=()
    COMPREPLY=()

    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if ((skip)); then
            skip=0
        elif [[ " $with_value " == *" $word "* ]]; then
            skip=1
        elif [[ -z $command && $word != [-=]* ]]; then
            command=$word
        elif [[ -z $second && $word != [-=]* ]]; then
            second=$word
        elif [[ $word != [-=]* ]]; then
            given+=("$word")
        fi
    done

    # `--json=short` arrives as three words, because bash breaks words at "=".
    local equals=''
    if [[ $current == '=' ]]; then
        equals=$previous current=''
    elif [[ $previous == '=' ]]; then
        equals=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    if [[ $equals == --json ]]; then
        # Only then, for `--json web1` is a name.
        mapfile -t COMPREPLY < <(compgen -W 'short pretty' -- "$current")
        return
    fi
    case ${equals:-$previous} in
        --state)
            mapfile -t COMPREPLY < <(compgen -W 'stopped starting running paused stopping crashed' -- "$current")
            return
            ;;
        --signal | -s)
            mapfile -t COMPREPLY < <(compgen -W 'SIGTERM SIGKILL SIGINT SIGHUP SIGQUIT SIGABRT' -- "$current")
            return
            ;;
        --lines | -n)
            mapfile -t COMPREPLY < <(compgen -W 'all 10 100 1000' -- "$current")
            return
            ;;
        --address)
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            return
            ;;
        --timeout | --daemon-timeout)
            mapfile -t COMPREPLY < <(compgen -W 'infinity 10 60 5min' -- "$current")
            return
            ;;
        --escape)
            mapfile -t COMPREPLY < <(compgen -W '^] ^A none' -- "$current")
            return
            ;;
    esac

    if [[ $command == network ]]; then
        _virtctl_network
        return
    fi
    if [[ $command == container ]]; then
        _virtctl_container
        return
    fi
    if [[ $command == pool ]]; then
        _virtctl_pool
        return
    fi
    if [[ $command == volume ]]; then
        _virtctl_volume
        return
    fi
    case $command in
        '') options="--version --json --no-legend" ;;
        list) options='--all --running --state --no-legend --json' ;;
        info | dump | status) options='--json' ;;
        fsck) options='--repair --no-legend --json' ;;
        slots) options='--no-legend --json' ;;
        shutdown) options='--timeout --no-wait' ;;
        reboot) options='--force --timeout' ;;
        kill) options='--signal' ;;
        wait) options='--state --timeout --json' ;;
        console) options='--force --read-only --lines --escape --timeout' ;;
        log) options='--follow --lines --qemu --stderr --json' ;;
        define) options='--check' ;;
        autostart) options='--disable' ;;
        *) options='' ;;
    esac
    if [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options $common" -- "$current")
        return
    fi

    case $command in
        '' | help) mapfile -t COMPREPLY < <(compgen -W "$commands" -- "$current") ;;
        define)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            ;;
        start) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_domains --state stopped,crashed)" -- "$current") ;;
        shutdown | stop | kill | reboot | console)
            mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_domains --running)" -- "$current")
            ;;
        suspend) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_domains --state running)" -- "$current") ;;
        resume) mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_domains --state paused)" -- "$current") ;;
        info | log | dump | wait | undefine | autostart)
            mapfile -t COMPREPLY < <(compgen -W "$(_virtctl_domains)" -- "$current")
            ;;
    esac
}

complete -F _virtctl virtctl
