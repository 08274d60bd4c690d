# SPDX-License-Identifier: LGPL-2.1-or-later
# Completion of virtdctl for bash. The names of domains are asked of the daemon, the rest is written down here; a unit
# test holds it against what virtdctl --help says.

# What the daemon lists, a line each. Not for long: a TAB must not hang.
_virtdctl_rows() {
    timeout 2 virtdctl "$@" 2>/dev/null
}

_virtdctl_names() {
    _virtdctl_rows "$@" | while read -r name _; do
        printf '%s\n' "$name"
    done
}

_virtdctl_domains() { _virtdctl_names list --no-legend "$@"; }
_virtdctl_networks() { _virtdctl_names network list --no-legend "$@"; }
_virtdctl_containers() { _virtdctl_names container list --no-legend "$@"; }
_virtdctl_volumes() { _virtdctl_names volume list --no-legend "$1"; }

_virtdctl_pools() {
    _virtdctl_rows pool list --no-legend | while read -r name state _; do
        [[ -z ${1-} || $state == "$1" ]] && printf '%s\n' "$name"
    done
}

_virtdctl_jobs() {
    _virtdctl_rows volume jobs --no-legend | while read -r name state _; do
        [[ $state == running || $state == waiting ]] && printf '%s\n' "$name"
    done
}

# Answer with those of the words in $1 that go on as what was typed.
_virtdctl_reply() {
    mapfile -t COMPREPLY < <(compgen -W "$1" -- "$current")
}

_virtdctl_files() {
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen -f -- "$current")
}

# `virtdctl network ...`; the variables are _virtdctl's.
_virtdctl_network() {
    case $second in
        list) options='--active --no-legend --json' ;;
        info | dump) options='--json' ;;
        leases) options='--no-legend --json' ;;
        stop) options='--force' ;;
        define) options='--check' ;;
        undefine) options='--remove-state' ;;
        autostart) options='--disable' ;;
        *) options='' ;;
    esac
    if [[ $current == -* ]]; then
        _virtdctl_reply "$options $common"
        return
    fi
    case $second in
        '')
            _virtdctl_reply 'list info leases start stop define undefine dump autostart'
            ;;
        define)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -W default -- "$current"; compgen -f -- "$current")
            ;;
        stop) _virtdctl_reply "$(_virtdctl_networks --active)" ;;
        *) _virtdctl_reply "$(_virtdctl_networks)" ;;
    esac
}

# `virtdctl container ...`; the variables are _virtdctl's.
_virtdctl_container() {
    case $second in
        list) options='--all --running --state --no-legend --json' ;;
        info | dump) options='--json' ;;
        shutdown) options='--timeout --no-wait' ;;
        reboot) options='--timeout' ;;
        kill) options='--signal' ;;
        wait) options='--state --timeout --json' ;;
        console) options='--force --read-only --lines --escape --timeout' ;;
        log) options='--follow --lines --qemu --stderr --raw --json' ;;
        exec) options='--terminal --no-terminal --no-input --env' ;;
        create) options='--image' ;;
        define) options='--check' ;;
        autostart) options='--disable' ;;
        *) options='' ;;
    esac
    if [[ $current == -* ]]; then
        _virtdctl_reply "$options $common"
        return
    fi
    case $second in
        '')
            _virtdctl_reply 'list info start shutdown stop kill reboot freeze thaw wait console
                log exec create define undefine dump autostart'
            ;;
        define)
            _virtdctl_files
            ;;
        start) _virtdctl_reply "$(_virtdctl_containers --state stopped,crashed)" ;;
        thaw) _virtdctl_reply "$(_virtdctl_containers --state paused)" ;;
        shutdown | stop | kill | reboot | freeze | console | exec)
            _virtdctl_reply "$(_virtdctl_containers --running)"
            ;;
        *) _virtdctl_reply "$(_virtdctl_containers)" ;;
    esac
}

# `virtdctl pool ...`; the variables are _virtdctl's.
_virtdctl_pool() {
    case $second in
        list) options='--no-legend --json' ;;
        info | dump) options='--json' ;;
        define) options='--check' ;;
        autostart) options='--disable' ;;
        *) options='' ;;
    esac
    if [[ $current == -* ]]; then
        _virtdctl_reply "$options $common"
        return
    fi
    case $second in
        '')
            _virtdctl_reply 'list info start stop refresh build define undefine dump
                autostart'
            ;;
        list) ;;
        define)
            _virtdctl_files
            ;;
        start | build) _virtdctl_reply "$(_virtdctl_pools inactive)" ;;
        stop | refresh) _virtdctl_reply "$(_virtdctl_pools active)" ;;
        *) _virtdctl_reply "$(_virtdctl_pools)" ;;
    esac
}

# `virtdctl volume ...`; the variables are _virtdctl's, among them the names that were given after the verb.
_virtdctl_volume() {
    case ${equals:-$previous} in
        --format)
            _virtdctl_reply 'raw qcow2'
            return
            ;;
        --from)
            _virtdctl_reply 'raw qcow2 vmdk vdi vhdx vpc'
            return
            ;;
        --preallocation)
            _virtdctl_reply 'off metadata falloc full'
            return
            ;;
        --to-pool | --backing-pool)
            _virtdctl_reply "$(_virtdctl_pools active)"
            return
            ;;
        --backing)
            _virtdctl_reply "$(_virtdctl_volumes "${given[0]-}")"
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
        _virtdctl_reply "$options $common"
        return
    fi
    case $second,${#given[@]} in
        ,*)
            _virtdctl_reply 'list info snapshots create clone import upload download resize wipe
                delete jobs wait cancel'
            ;;
        jobs,*) ;;
        wait,0 | cancel,*) _virtdctl_reply "$(_virtdctl_jobs)" ;;
        *,0) _virtdctl_reply "$(_virtdctl_pools active)" ;;
        info,1 | snapshots,1 | clone,1 | import,1 | download,1 | resize,1 | wipe,1 | delete,*)
            _virtdctl_reply "$(_virtdctl_volumes "${given[0]}")"
            ;;
        import,2 | upload,2 | download,2)
            _virtdctl_files
            ;;
    esac
}

_virtdctl() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} command='' second='' word skip=0 options
    local -r commands='list info start shutdown stop kill reboot suspend resume wait console log
        define undefine dump upgrade-machine autostart status fsck events slots reload container network pool volume help'
    local -r common='--help --daemon-timeout --address'
    local -r with_value='--address --env -e --image --daemon-timeout --escape --lines -n --signal -s --since --state --timeout
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
        _virtdctl_reply 'short pretty'
        return
    fi
    case ${equals:-$previous} in
        --state)
            _virtdctl_reply 'stopped starting running paused stopping crashed'
            return
            ;;
        --signal | -s)
            _virtdctl_reply 'SIGTERM SIGKILL SIGINT SIGHUP SIGQUIT SIGABRT'
            return
            ;;
        --lines | -n)
            _virtdctl_reply 'all 10 100 1000'
            return
            ;;
        --address)
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            return
            ;;
        --timeout | --daemon-timeout)
            _virtdctl_reply 'infinity 10 60 5min'
            return
            ;;
        --escape)
            _virtdctl_reply '^] ^A none'
            return
            ;;
    esac

    if [[ $command == @(network|container|pool|volume) ]]; then
        "_virtdctl_$command"
        return
    fi
    case $command in
        '') options="--version --json --no-legend" ;;
        list) options='--all --running --state --no-legend --json' ;;
        info | dump | status) options='--json' ;;
        fsck) options='--repair --no-legend --json' ;;
        events) options='--since --json' ;;
        slots) options='--no-legend --json' ;;
        shutdown) options='--timeout --no-wait' ;;
        reboot) options='--force --timeout' ;;
        kill) options='--signal' ;;
        wait) options='--state --timeout --json' ;;
        console) options='--force --read-only --lines --escape --timeout' ;;
        log) options='--follow --lines --qemu --stderr --raw --json' ;;
        define) options='--check' ;;
        autostart) options='--disable' ;;
        *) options='' ;;
    esac
    if [[ $current == -* ]]; then
        _virtdctl_reply "$options $common"
        return
    fi

    case $command in
        '' | help) _virtdctl_reply "$commands" ;;
        define)
            _virtdctl_files
            ;;
        start) _virtdctl_reply "$(_virtdctl_domains --state stopped,crashed)" ;;
        shutdown | stop | kill | reboot | console)
            _virtdctl_reply "$(_virtdctl_domains --running)"
            ;;
        suspend) _virtdctl_reply "$(_virtdctl_domains --state running)" ;;
        resume) _virtdctl_reply "$(_virtdctl_domains --state paused)" ;;
        info | log | dump | wait | undefine | upgrade-machine | autostart)
            _virtdctl_reply "$(_virtdctl_domains)"
            ;;
    esac
}

complete -F _virtdctl virtdctl
