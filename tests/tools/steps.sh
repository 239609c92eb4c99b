# Shell functions of ./run and ./test: long steps with visible progress, and packages that are installed if missing. The
# caller sets log (a scratch file) and calls steps_end when it leaves.
ticker=

steps_end() {
	[ -z "$ticker" ] || kill "$ticker" 2>/dev/null || true
	rm -f "$log"
}

# step TEXT COMMAND...: runs the command with its output in a log; shows the text and the seconds that pass on standard
# error, and the log's end if the command fails.
step() {
	text=$1
	shift
	began=$(date +%s)
	if [ -t 2 ]; then
		# The seconds, and the last line of what the command said.
		(
			while sleep 1; do
				last=$(tail -c 400 "$log" 2>/dev/null | tr -d '\033' | tr '\r' '\n' | grep -v '^ *$' | tail -n 1 | cut -c1-60)
				printf '\r\033[K%s ... %ds  %s' "$text" $(($(date +%s) - began)) "$last" >&2
			done
		) &
		ticker=$!
		printf '%s ...' "$text" >&2
	else
		echo "$text ..." >&2
	fi
	status=0
	"$@" >"$log" 2>&1 </dev/null || status=$?
	if [ -n "$ticker" ]; then
		kill "$ticker" 2>/dev/null || true
		wait "$ticker" 2>/dev/null || true
		ticker=
	fi
	[ -t 2 ] && printf '\r\033[K' >&2
	if [ $status != 0 ]; then
		echo "$text failed (exit status $status). It ended with:" >&2
		tail -n 30 "$log" | sed 's/^/  | /' >&2
		exit 1
	fi
	echo "$text: done in $(($(date +%s) - began)) s" >&2
}

missing() {
	for package; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
	done
}

apt_install() {
	export DEBIAN_FRONTEND=noninteractive
	# Package lists that are missing or older than the archive are fetched, then it is tried again.
	apt-get install -y -q --no-install-recommends "$@" || { apt-get update -q && apt-get install -y -q --no-install-recommends "$@"; }
}

install() {
	wanted=$(missing "$@" | tr '\n' ' ')
	[ -z "$wanted" ] && return 0
	if [ "$(id -u)" != 0 ]; then
		echo "these packages are missing: $wanted- install them as root, or run this as root" >&2
		exit 1
	fi
	# shellcheck disable=SC2086
	step "Installing $wanted" apt_install $wanted
}
