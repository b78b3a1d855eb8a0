///usr/bin/env true; exec jbang "$0" "$@"
// A shell runs the line above; to Java it is a comment. exec leaves no shell behind, which a signal would end instead.

// buildkit-prestop: a Kubernetes preStop hook that waits for BuildKit's clients before it lets the pod stop.
//
// BuildKit does not wait for running builds when it gets SIGTERM (https://github.com/moby/buildkit/issues/4090).
// Kubernetes sends SIGTERM when the preStop hook has ended, whatever its exit code, or when the pod's grace period is
// over. So this hook stays while somebody builds.
//
// A client stays connected to buildkitd, to its TCP port or to its unix socket, for as long as it builds. The hook
// counts these connections again and again, and exits 0 once there was none for a while, the quiet time.
//
// First it asks a tool, netstat or else ss. A client that it shows is believed; that it shows none proves nothing. So a
// tool can only make the hook stay: it is a second pair of eyes. Then the kernel's own tables are read. Only they can
// say that there is no client, and only if they also show that buildkitd listens. A port or a socket that the user has
// set must have a listener. A default may have none, as long as the other one has. If the tables cannot be read, or
// show no such listener, it is unknown who is connected, and unknown is not quiet.
//
// The hook cannot see clients of another port or socket than those two, nor clients outside of the pod that came over a
// shared socket file.

//JAVA 17+
//DEPS info.picocli:picocli:4.7.7
// The hook runs beside the builds, so its JVM is kept small. Strings are joined without classes made at run time.
//JAVAC_OPTIONS -XDstringConcat=inline
// It needs 2 MB of heap, and up to 32 where its environment holds megabytes.
//JAVA_OPTIONS -XX:+UseSerialGC -Xms2m -Xmx32m -Xmn1m
// Only the quick compiler is used, and only for the busiest loops: 4 MB less.
//JAVA_OPTIONS -XX:TieredStopAtLevel=1 -XX:CompileThresholdScaling=100
// No file is made in /tmp, which may be read-only.
//JAVA_OPTIONS -XX:-UsePerfData
// An image's JAVA_TOOL_OPTIONS may name another collector, and a JVM with two does not start.
//JAVA_OPTIONS -XX:+IgnoreUnrecognizedVMOptions -XX:-UseG1GC -XX:-UseParallelGC -XX:-UseZGC -XX:-UseShenandoahGC

import java.io.*;
import java.net.*;
import java.nio.*;
import java.nio.charset.*;
import java.nio.file.*;
import java.time.Instant;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.ExecutionException; // and not picocli's
import java.util.concurrent.locks.LockSupport;
import java.util.function.*;
import java.util.regex.*;
import java.util.stream.Stream;
import picocli.CommandLine;
import picocli.CommandLine.*;

@Command(name = "buildkit-prestop", version = "buildkit-prestop 1.0.0", mixinStandardHelpOptions = true,
        sortOptions = false, showDefaultValues = true, exitCodeListHeading = "%nExit codes:%n",
        description = "Waits until no client has been connected to buildkitd for a while.",
        exitCodeList = {"0:quiet long enough (--once: could look)", "1:--once could not look, or could not print",
            "2:bad command line", "124:gave up at MAX_WAIT_SECONDS"},
        footer = {"", "A flag wins over the environment. A bad flag ends the command. A bad value",
            "in the environment is logged, and the default is used."})
class BuildkitPrestop implements Callable<Integer> {
    @Option(names = "--port", defaultValue = "1234", paramLabel = "PORT", converter = PortNumber.class,
            description = "port that buildkitd listens on, 1 to 65535 (BUILDKITD_PORT)") int port;
    @Option(names = "--socket", defaultValue = "buildkitd.sock", paramLabel = "PATH", converter = SocketPath.class,
            description = "unix socket that buildkitd listens on: a path, or the end of one;"
                    + " empty (--socket=): look at TCP only (BUILDKITD_SOCKET)") String socket;
    @Option(names = "--check-frequency-ms", defaultValue = "500", paramLabel = "MS", converter = AtLeastOne.class,
            description = "time between two checks, at least 1 (CHECK_FREQUENCY_MS)") int checkFrequencyMs;
    @Option(names = "--quiet-seconds", defaultValue = "10", paramLabel = "S", converter = WholeNumber.class,
            description = "how long it must stay quiet, at least 0 (WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS)")
    int quietSeconds;
    @Option(names = "--max-wait-seconds", defaultValue = "0", paramLabel = "S", converter = WholeNumber.class,
            description = "give up after this long; 0: no limit (MAX_WAIT_SECONDS)") int maxWaitSeconds;
    @Option(names = "--log-format", defaultValue = "json", paramLabel = "NAME", converter = LogFormat.class,
            description = "json or text (LOG_FORMAT)") Log.Format logFormat;
    @Option(names = "--log-prefix", defaultValue = "[PreStop Hook]", paramLabel = "TEXT",
            description = "put before each message; empty (--log-prefix=): none (LOG_PREFIX)") String logPrefix;
    @Option(names = "--debug", description = "log every check (DEBUG: any value that is not empty)") boolean debug;
    @Option(names = "--sidecar", paramLabel = "FIFO",
            description = "stay, and serve readers of this FIFO: each gets a line when its wait is over") Path sidecar;
    @Option(names = "--once", description = "look once, print the number of active connections, exit;"
            + " not for a preStop hook") boolean once;

    /** The environment variables, by the flags that win over them. */
    private static final Map<String, String> VARIABLES = Map.of(
            "--port", "BUILDKITD_PORT",
            "--socket", "BUILDKITD_SOCKET",
            "--check-frequency-ms", "CHECK_FREQUENCY_MS",
            "--quiet-seconds", "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS",
            "--max-wait-seconds", "MAX_WAIT_SECONDS",
            "--log-format", "LOG_FORMAT",
            "--log-prefix", "LOG_PREFIX"); // and DEBUG, any value of which will do

    static final int OK = 0, COULD_NOT_LOOK = 1, BAD_COMMAND_LINE = 2, GAVE_UP = 124; // the last as timeout(1) does

    final List<Endpoint> endpoints = new ArrayList<>();
    Log log;
    @Spec private Model.CommandSpec spec;

    /** Takes from the environment what has no flag. Returns the flags of all that the user has set, even badly. */
    private Set<String> readEnvironment(List<String> warnings) {
        Set<String> setByUser = new HashSet<>();
        for (Model.OptionSpec option : spec.options()) {
            String flag = option.longestName(), variable = VARIABLES.getOrDefault(flag, "");
            boolean hasFlag = spec.commandLine().getParseResult().hasMatchedOption(flag);
            if (!hasFlag && !isSet(variable)) { continue; }
            setByUser.add(flag);
            if (!hasFlag) { take(variable, option, warnings); }
        }
        debug |= isSet("DEBUG");
        return setByUser;
    }

    /** A bad value must not cost a build: then the default stays. */
    private static void take(String variable, Model.OptionSpec option, List<String> warnings) {
        String value = System.getenv(variable);
        try {
            option.setValue(option.converters().length == 0 ? value : option.converters()[0].convert(value));
        } catch (Exception e) {
            warnings.add("Ignoring " + variable + ", using " + option.defaultValue() + ": " + e.getMessage());
        }
    }

    /** Whether the user has set it. */
    private static boolean isSet(String variable) {
        String value = System.getenv(variable), serviceHost = System.getenv("BUILDKITD_SERVICE_HOST");
        if (value == null) { return false; }
        if (value.isEmpty()) { return variable.matches("BUILDKITD_SOCKET|LOG_PREFIX"); } // only there it has a meaning
        // Kubernetes itself sets BUILDKITD_PORT=tcp://10.96.83.161:1234 where there is a Service named buildkitd.
        return !variable.equals("BUILDKITD_PORT") || serviceHost == null
                || !value.matches("(tcp|udp|sctp)://\\[?" + Pattern.quote(serviceHost) + "]?:\\d+");
    }

    /** How many checks in a row must be quiet: N sleeps make the quiet time, and N + 1 checks stand around them. */
    long checksNeeded() {
        long sleeps = (quietSeconds * 1000L + checkFrequencyMs - 1) / checkFrequencyMs;
        return Math.max(2, sleeps + 1); // one look is never enough: it may miss a row while other sockets close
    }

    static class WholeNumber implements ITypeConverter<Integer> {
        int least = 0, most = Integer.MAX_VALUE;

        @Override public Integer convert(String value) {
            String digits = value.strip();
            if (digits.matches("\\d{1,10}") && Long.parseLong(digits) >= least && Long.parseLong(digits) <= most) {
                return Integer.valueOf(digits);
            }
            throw new TypeConversionException("'" + value + "' is not a whole number from " + least + " to " + most);
        }
    }

    static class AtLeastOne extends WholeNumber { { least = 1; } }
    static class PortNumber extends AtLeastOne { { most = 65535; } }

    static class SocketPath implements ITypeConverter<String> {
        @Override public String convert(String value) {
            String path = value.strip().replaceFirst("^unix://", ""); // as buildkitd's own addresses begin
            // In the C locale Java has U+FFFD for each byte beyond ASCII.
            int bytes = path.replace('\uFFFD', '?').getBytes(StandardCharsets.UTF_8).length;
            boolean isTcpOnly = value.isEmpty(); // "unix://" alone is not
            if (isTcpOnly || bytes >= 1 && bytes <= 107) { return path; } // see unix(7)
            throw new TypeConversionException("'" + value + "' is not a path of 1 to 107 bytes");
        }
    }

    static class LogFormat implements ITypeConverter<Log.Format> {
        @Override public Log.Format convert(String value) {
            if (value.matches("json|text")) { return Log.Format.valueOf(value); }
            throw new TypeConversionException("'" + value + "' is not json or text");
        }
    }

    public static void main(String... args) {
        Runtime.getRuntime().addShutdownHook(new Thread(Tool::endAll));
        CommandLine command = new CommandLine(new BuildkitPrestop()).setExpandAtFiles(false);
        command.setParameterExceptionHandler((badFlag, rest) -> {
            command.getErr().println(badFlag.getMessage() + " (see --help)");
            return BAD_COMMAND_LINE;
        });
        System.exit(command.execute(args));
    }

    @Override public Integer call() throws IOException, InterruptedException {
        if (sidecar != null && (once || sidecar.toString().isEmpty())) {
            throw new ParameterException(spec.commandLine(), "--sidecar needs a path, and does not go with --once");
        }
        List<String> warnings = new ArrayList<>();
        Set<String> setByUser = readEnvironment(warnings);
        endpoints.add(Endpoint.port(port, setByUser.contains("--port")));
        if (!socket.isEmpty()) { endpoints.add(Endpoint.socket(socket, setByUser.contains("--socket"))); }
        long sleepsMs = (checksNeeded() - 1) * checkFrequencyMs; // and the looks take some time, too
        if (maxWaitSeconds > 0 && maxWaitSeconds * 1000L <= sleepsMs) {
            warnings.add("MAX_WAIT_SECONDS, " + maxWaitSeconds + " s, is not longer than the quiet time:"
                    + " the hook will give up even if nobody is connected");
        }
        // Nobody sees a hook's own stderr; what PID 1 writes there is what kubectl logs shows. --once has a terminal.
        log = new Log(logFormat, logPrefix, System.getenv("KUBERNETES_SERVICE_HOST") != null && !once);
        warnings.forEach(warning -> log.add("warning", warning + "."));
        if (sidecar != null) { new Sidecar(sidecar.toAbsolutePath(), this).serve(); } // never returns
        int exitCode = once ? printCount() : new Drain(this).waitUntilQuiet(OutputStream.nullOutputStream());
        log.close();
        return exitCode;
    }

    private int printCount() throws IOException {
        Look look = new Sockets(endpoints, log).look(true);
        if (look.isKnown()) { System.out.println(look.count()); }
        if (look.isKnown() && !System.out.checkError()) { return OK; }
        log.add("warning", look.isKnown() ? "Could not print the number of connections." : look.describe(0) + ".");
        return COULD_NOT_LOOK;
    }
}

/** One wait, from its first look to its end. */
class Drain {
    private static final long SIGN_OF_LIFE_MS = 60_000;
    private static final int MOST_PEERS = 5;

    private final BuildkitPrestop settings;
    private final Log log;
    private final Sockets sockets;
    private final long start = System.nanoTime();
    private String seen = "nothing is known"; // by the last check, in words
    private String logged; // what was news when it was logged last
    private long loggedMs;

    Drain(BuildkitPrestop settings) {
        this.settings = settings;
        log = settings.log;
        sockets = new Sockets(settings.endpoints, log);
    }

    /**
     * Returns the exit code. At each check it writes a blank to the sidecar's reader, if it works for one, and throws
     * an IOException if that has gone.
     */
    int waitUntilQuiet(OutputStream reader) throws IOException, InterruptedException {
        log.add("info", "Waiting for build processes to finish...");
        long quietChecks = 0;
        while (true) {
            reader.write(' ');
            // While it stays quiet, all but the first and the last check ask the kernel alone, which is cheaper.
            boolean askATool = quietChecks == 0 || quietChecks + 1 >= settings.checksNeeded();
            quietChecks = isQuiet(askATool) ? quietChecks + 1 : 0;
            if (quietChecks >= settings.checksNeeded()) {
                log.add("info", "All build processes seem to have stopped. Exiting now.");
                return BuildkitPrestop.OK;
            }
            int limit = settings.maxWaitSeconds, sleepMs = settings.checkFrequencyMs;
            long leftMs = limit == 0 ? Long.MAX_VALUE : limit * 1000L - waitedMs();
            Thread.sleep(Math.max(0, Math.min(sleepMs, leftMs)));
            if (leftMs < sleepMs) { // after so short a sleep another quiet check would not count
                log.add("warning", "Giving up after MAX_WAIT_SECONDS, " + limit + " s: " + seen + ".");
                return BuildkitPrestop.GAVE_UP;
            }
        }
    }

    /** One check. Whatever goes wrong in it, even in its report, it is not quiet, and the wait goes on. */
    private boolean isQuiet(boolean askATool) {
        try {
            Look look = sockets.look(askATool);
            report(look);
            return look.isKnown() && look.count() == 0;
        } catch (Throwable e) {
            log.add("warning", e);
            return false;
        }
    }

    /** Logs what was seen if it is news, and once a minute as a sign of life. */
    private void report(Look look) throws IOException {
        seen = look.describe(MOST_PEERS);
        if (settings.debug) {
            log.add("debug", "Active connections to buildkitd: " + (look.isKnown() ? look.count() : "unknown"));
        }
        // Another count is news, other peers are not. Nor are other digits in a reason, or what stands behind a colon.
        String news = look.isKnown() ? look.describe(0) : look.whyUnknown.replaceAll("(?s)\\d+|: .*", "");
        long nextCheckMs = waitedMs() + settings.checkFrequencyMs;
        boolean signOfLifeIsDue = nextCheckMs > loggedMs + SIGN_OF_LIFE_MS; // then it would be late
        if (!news.equals(logged) || signOfLifeIsDue) {
            loggedMs = waitedMs();
            logged = news;
            log.add(look.isKnown() ? "info" : "warning", seen + ". Waited " + loggedMs / 1000 + " s so far.");
        }
    }

    private long waitedMs() { return TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - start); }
}

/** Asks who is connected: first a tool, a witness that can only make the hook stay, and then the kernel, the judge. */
class Sockets {
    private final List<Endpoint> endpoints;
    private final Log log;
    private final List<Tool> tools = new ArrayList<>(List.of(Tool.values())); // except those that have failed

    Sockets(List<Endpoint> endpoints, Log log) { this.endpoints = endpoints; this.log = log; }

    /** Never throws: where it fails, the look is unknown. */
    Look look(boolean askATool) {
        Look look = new Look(endpoints);
        try {
            if (askATool) { askATool(look); }
            if (look.count() == 0) { askTheKernel(look); } // that a tool saw nobody proves nothing
        } catch (Throwable e) { // out of memory or file descriptors, perhaps
            look.whyUnknown = reasonOf(e);
        }
        return look;
    }

    /** Asks the first that is installed. One that fails is not asked again: each try might leave a process behind. */
    private void askATool(Look look) throws InterruptedException {
        for (Tool tool : List.copyOf(tools)) {
            if (tool.find().isEmpty()) { continue; }
            try {
                tool.connections().forEach(look::add);
                return;
            } catch (ExecutionException | TimeoutException | OutOfMemoryError e) { // the last: no thread can be started
                tools.remove(tool);
                log.add("info", "Could not use " + tool + ", and will not try again: " + reasonOf(e) + ".");
            }
        }
    }

    private void askTheKernel(Look look) throws IOException {
        for (Endpoint endpoint : endpoints) {
            for (KernelTable table : endpoint.tables()) { table.read(look::add); }
        }
        // Who sees no listener cannot have looked at buildkitd. If neither must listen, one of them is enough.
        List<Endpoint> silent = look.withoutListener();
        List<Endpoint> missing = silent.stream()
                .filter(endpoint -> endpoint.mustListen() || silent.size() == endpoints.size()).toList();
        if (look.count() == 0 && !missing.isEmpty()) {
            throw new IOException("nothing listens on " + Endpoint.names(missing));
        }
    }

    private static String reasonOf(Throwable e) {
        Throwable cause = e instanceof ExecutionException ? e.getCause() : e;
        return Objects.requireNonNullElse(cause.getMessage(), cause.toString());
    }
}

/** What was seen of buildkitd's endpoints. */
class Look {
    private final List<Endpoint> endpoints;
    private final Set<Row> connections = new LinkedHashSet<>(); // the kernel may show a row twice
    private final List<Row> listeners = new ArrayList<>(); // only the kernel shows them
    String whyUnknown; // null: it is known who is connected

    Look(List<Endpoint> endpoints) { this.endpoints = endpoints; }

    /** Keeps the row if it is one of the endpoints'. */
    void add(Row row) {
        for (Endpoint endpoint : endpoints) {
            if (!endpoint.owns().test(row)) { continue; }
            switch (row.state()) {
                case CONNECTED -> connections.add(row);
                case LISTENING -> listeners.add(row);
                case OTHER -> { }
                case UNKNOWN -> throw new IllegalStateException("unknown state of a socket of " + endpoint.name());
            }
        }
    }

    boolean isKnown() { return whyUnknown == null; }

    int count() { return connections.size(); }

    List<Endpoint> withoutListener() {
        return endpoints.stream().filter(endpoint -> listeners.stream().noneMatch(endpoint.owns())).toList();
    }

    /** In words, naming at most so many peers of an endpoint. */
    String describe(int mostPeers) throws IOException {
        if (!isKnown()) {
            return "Cannot tell whether clients are connected to " + Endpoint.names(endpoints) + ": " + whyUnknown;
        }
        List<Endpoint> silent = listeners.isEmpty() ? List.of() : withoutListener(); // a tool shows no listeners
        List<String> parts = new ArrayList<>();
        for (Endpoint endpoint : endpoints) {
            List<Row> own = connections.stream().filter(endpoint.owns()).toList();
            // If somebody is connected, say where; if nobody is, say where that was looked for.
            boolean belongsHere = count() > 0 ? !own.isEmpty() : !silent.contains(endpoint);
            if (belongsHere) { parts.add(own.size() + " to " + endpoint.name() + peersOf(own, mostPeers)); }
        }
        String words = String.join(" and ", parts).replaceFirst("^1 ", "1 connection ")
                .replaceFirst("^(\\d+) to", "$1 connections to");
        return words + (silent.isEmpty() ? "" : "; nothing listens on " + Endpoint.names(silent));
    }

    private static String peersOf(List<Row> rows, int most) throws IOException {
        List<String> peers = new ArrayList<>();
        for (Row row : rows.subList(0, Math.min(most, rows.size()))) {
            if (row.port() > 0) { peers.add(row.peerName()); }
        }
        String more = rows.size() > most ? " and " + (rows.size() - most) + " more" : "";
        return peers.isEmpty() ? "" : " from " + String.join(", ", peers) + more;
    }
}

/** Where buildkitd listens: its name, whether it must do so, which rows are its own, and which tables have them. */
record Endpoint(String name, boolean mustListen, Predicate<Row> owns, List<KernelTable> tables) {
    static Endpoint port(int number, boolean mustListen) {
        return new Endpoint("port " + number, mustListen, row -> row.port() == number,
                List.of(KernelTable.tcp, KernelTable.tcp6));
    }

    /** A path, or the end of one. */
    static Endpoint socket(String path, boolean mustListen) {
        String end = "/" + asciiOf(path);
        return new Endpoint(path, mustListen, row -> ("/" + asciiOf(row.path())).endsWith(end),
                List.of(KernelTable.unix));
    }

    /** Characters beyond ASCII are all alike: in the C locale Java cannot read them from the environment. */
    private static String asciiOf(String path) { return path.replaceAll("[^ -~]+", "?"); }

    static String names(List<Endpoint> endpoints) {
        return String.join(" or ", endpoints.stream().map(Endpoint::name).toList());
    }
}

enum State { CONNECTED, LISTENING, OTHER, UNKNOWN }

/** A socket as a table shows it. One of TCP has a port and a peer, one of unix an inode and a path, which may be "". */
record Row(State state, int port, String peer, String inode, String path) {
    static Row ofTcp(State state, int port, String peer) { return new Row(state, port, peer, "", ""); }

    static Row ofUnix(State state, String inode, String path) {
        return new Row(state, 0, "", inode, Objects.requireNonNullElse(path, ""));
    }

    /** The peer as people write it, 10.0.0.7:41234 or [2001:db8::7]:41234, whoever has shown it. */
    String peerName() throws UnknownHostException {
        int colon = peer.lastIndexOf(':');
        String address = peer.substring(0, colon), port = peer.substring(colon + 1);
        if (address.matches("(\\p{XDigit}{8}){1,4}")) { // see Documentation/networking/proc_net_tcp.rst of Linux
            ByteBuffer bytes = ByteBuffer.allocate(address.length() / 2).order(ByteOrder.nativeOrder());
            for (String word : address.split("(?<=\\G.{8})")) { bytes.putInt(Integer.parseUnsignedInt(word, 16)); }
            address = InetAddress.getByAddress(bytes.array()).getHostAddress().replaceFirst("(^|:)0(:0)+(:|$)", "::");
            port = String.valueOf(Integer.parseInt(port, 16));
        }
        address = address.replaceAll("^\\[?::ffff:(?=.*\\.)|[\\[\\]]", "");
        return (address.contains(":") ? "[" + address + "]" : address) + ":" + port;
    }
}

/** The tables of /proc/net, see proc_pid_net(5). Ports and states are hexadecimal. */
enum KernelTable {
    tcp(" *sl +local_address +rem_address +st .*", tcpRow(8)),
    tcp6(" *sl +local_address +rem(ote)?_address +st .*", tcpRow(32)),
    unix("Num +RefCount +Protocol +Flags +Type +St +Inode +Path",
            "[0-9a-f]+: [0-9A-F]{8} [0-9A-F]{8} (?<state>[0-9A-F]{8} [0-9A-F]{4} [0-9A-F]{2})"
            + " +(?<inode>\\d+)( (?<path>.*))?");

    private final Path file = Path.of("/proc/net", name());
    private final Pattern heading, row;

    KernelTable(String heading, String row) {
        this.heading = Pattern.compile(heading);
        this.row = Pattern.compile(row, Pattern.DOTALL);
    }

    private static String tcpRow(int digitsOfAddress) {
        return String.format(" *\\d+: [0-9A-F]{%1$d}:(?<port>[0-9A-F]{4}) (?<peer>[0-9A-F]{%1$d}:[0-9A-F]{4})"
                + " (?<state>[0-9A-F]{2}) .*", digitsOfAddress);
    }

    void read(Consumer<Row> rows) throws IOException {
        if (this == tcp6 && Files.notExists(file)) { return; } // there is no IPv6
        try (InputStream in = new FileInputStream(file.toFile())) { parse(in, rows); }
    }

    /** Hands on each row. Throws an IOException if this is anything but the heading and rows, whole to the end. */
    void parse(InputStream in, Consumer<Row> rows) throws IOException {
        byte[] chunk = new byte[4096];
        String text = ""; // what was read and is not parsed yet
        boolean headingIsDone = false;
        for (int bytes; (bytes = in.read(chunk)) > 0; ) {
            text += new String(chunk, 0, bytes, StandardCharsets.ISO_8859_1);
            int start = 0;
            for (int end; (end = text.indexOf('\n', start)) >= 0; start = end + 1) {
                String line = text.substring(start, end);
                Matcher words = (headingIsDone ? row : heading).matcher(line);
                if (!words.matches()) { throw new IOException(file + " has a row that cannot be read: " + line); }
                if (headingIsDone) { rows.accept(toRow(words)); }
                headingIsDone = true;
            }
            text = text.substring(start);
        }
        if (!headingIsDone || !text.isEmpty()) { throw new IOException(file + " is cut off"); }
    }

    private Row toRow(Matcher words) {
        String state = words.group("state");
        return this == unix ? Row.ofUnix(unixState(state), words.group("inode"), words.group("path"))
                : Row.ofTcp(tcpState(state), Integer.parseInt(words.group("port"), 16), words.group("peer"));
    }

    /** See net/tcp_states.h of Linux. */
    private static State tcpState(String number) {
        return switch (number) {
            case "01" -> State.CONNECTED;
            case "0A" -> State.LISTENING;
            case "02", "03", "04", "05", "06", "07", "08", "09", "0B" -> State.OTHER;
            default -> State.UNKNOWN;
        };
    }

    /** Flags, type (0001: a stream) and state, see linux/net.h. A client that was not accepted yet has the state 02. */
    private static State unixState(String words) {
        return switch (words) {
            case "00000000 0001 03", "00000000 0001 02" -> State.CONNECTED;
            case "00010000 0001 01" -> State.LISTENING;
            default -> words.matches("000[01]0000 000[1-5] 0[0-4]") ? State.OTHER : State.UNKNOWN;
        };
    }
}

/** The commands that list sockets, in the order in which they are asked, and how each writes a connected one. */
enum Tool {
    /** See netstat(8): that of net-tools, and BusyBox'. */
    netstat("tcp\\S* +\\S+ +\\S+ +\\S*:(?<port>\\d{1,5}) +(?<peer>\\S+:\\d+) +ESTABLISHED.*",
            "unix +\\S+ +\\[[^]]*] +STREAM +CONNECT(?:ED|ING) +(?<inode>\\d+) +(?<path>.*)"),
    /** See ss(8). */
    ss("tcp +ESTAB +\\S+ +\\S+ +\\S*:(?<port>\\d{1,5}) +(?<peer>\\S+:\\d+).*",
            "u_str +ESTAB +\\S+ +\\S+ +(?<path>.*\\S) +(?<inode>\\d+) +\\* +\\d+.*");

    private static final int LIMIT_S = 5;
    private static final Semaphore MAY_START = new Semaphore(1);

    private final Pattern tcpRow, unixRow;

    Tool(String tcpRow, String unixRow) {
        this.tcpRow = Pattern.compile(tcpRow, Pattern.DOTALL);
        this.unixRow = Pattern.compile(unixRow, Pattern.DOTALL);
    }

    /** The connections that it shows, whatever else it does. Throws if it cannot be started or does not end in 5 s. */
    List<Row> connections() throws ExecutionException, TimeoutException, InterruptedException {
        // Even its start can be held up, by what watches over programs. So another thread does it.
        FutureTask<List<Row>> answer = new FutureTask<>(this::run);
        new Thread(answer).start();
        try {
            return answer.get(LIMIT_S, TimeUnit.SECONDS);
        } catch (TimeoutException e) {
            endChildren();
            throw new TimeoutException("no answer in " + LIMIT_S + " s");
        }
    }

    private List<Row> run() throws IOException, InterruptedException {
        ProcessBuilder builder = new ProcessBuilder(find().orElseThrow().getPath(), "-tanx")
                .redirectError(ProcessBuilder.Redirect.DISCARD)
                .redirectInput(ProcessBuilder.Redirect.INHERIT); // it reads nothing, so that saves a pipe
        builder.environment().put("LC_ALL", "C"); // net-tools translates its output
        Process process;
        MAY_START.acquire();
        try { process = builder.start(); } finally { MAY_START.release(); }
        List<Row> rows = parse(process.inputReader(StandardCharsets.ISO_8859_1));
        process.waitFor();
        return rows;
    }

    List<Row> parse(BufferedReader output) throws IOException {
        List<Row> rows = new ArrayList<>();
        for (String line; (line = output.readLine()) != null; ) {
            Matcher tcp = tcpRow.matcher(line), unix = unixRow.matcher(line.strip());
            if (tcp.matches()) {
                rows.add(Row.ofTcp(State.CONNECTED, Integer.parseInt(tcp.group("port")), tcp.group("peer")));
            } else if (unix.matches()) {
                rows.add(Row.ofUnix(State.CONNECTED, unix.group("inode"), unix.group("path")));
            }
        }
        return rows;
    }

    Optional<File> find() {
        String path = Objects.requireNonNullElse(System.getenv("PATH"), "/usr/sbin:/usr/bin:/sbin:/bin");
        return Stream.of(path.split(":")).map(directory -> new File(directory, name()))
                .filter(file -> file.canExecute() && !file.isDirectory()).findFirst();
    }

    /** A tool that runs when SIGTERM arrives must not outlive the hook, and none may be started after it. */
    static void endAll() {
        for (int i = 0; i < 50; i++) { // half a second
            boolean noneCanStart = MAY_START.tryAcquire(); // which is never given back
            endChildren();
            if (noneCanStart) { return; }
            LockSupport.parkNanos(10_000_000); // a start is under way, and may have no child yet
        }
    }

    private static void endChildren() {
        ProcessHandle.current().descendants().forEach(ProcessHandle::destroyForcibly);
    }
}

/**
 * Waits on behalf of the preStop hook of another container. That hook is a line of shell, see README.md, which tries
 * each second to read a line from a FIFO, see fifo(7), and ends when it has got one. Where there is no FIFO, or its
 * writer dies, the try fails. So the hook never ends without the sidecar's word.
 */
record Sidecar(Path fifo, BuildkitPrestop settings) {
    private static final long RETRY_MS = 1000;

    void serve() throws InterruptedException {
        Log log = settings.log;
        String complaint = "";
        while (true) {
            try {
                makeFifo();
                log.add("info", "Ready: waiting for a reader of " + fifo + ".");
                // This blocks until somebody opens it for reading. WRITE alone makes no file where there is no FIFO.
                try (OutputStream reader = Files.newOutputStream(fifo, StandardOpenOption.WRITE)) {
                    // The next reader has to wait for the next FIFO. That none is there tells a probe that it drains.
                    Files.deleteIfExists(fifo);
                    answer(reader);
                }
                complaint = "";
            } catch (Throwable e) {
                if (!complaint.equals(e.toString())) { // not again each second
                    complaint = e.toString();
                    log.add("warning", "Could not serve " + fifo + ", trying again: " + complaint);
                }
                Thread.sleep(RETRY_MS);
            }
        }
    }

    private void answer(OutputStream reader) throws InterruptedException {
        try {
            // The blanks that the wait writes before the line are nothing to a shell's "read".
            boolean quiet = new Drain(settings).waitUntilQuiet(reader) == BuildkitPrestop.OK;
            reader.write((quiet ? "quiet\n" : "gave up\n").getBytes(StandardCharsets.UTF_8));
        } catch (IOException e) {
            settings.log.add("info", "The reader of " + fifo + " has gone: " + e.getMessage() + ".");
        }
    }

    /** Keeps a FIFO that is there. A plain file is refused: what is written to it would stay for later readers. */
    private void makeFifo() throws Exception {
        Process shell = new ProcessBuilder("sh", "-c", "test -p \"$0\" || mkfifo -m 666 \"$0\"", fifo.toString())
                .redirectErrorStream(true).start();
        String complaint = new String(shell.getInputStream().readAllBytes(), StandardCharsets.UTF_8).strip();
        if (shell.waitFor() != 0) { throw new IOException(complaint); }
    }
}

/**
 * Writes lines where they can be seen. Writing to a pipe that nobody reads never ends, so a thread of its own does it:
 * a hundred lines may wait for it, and those that cannot be written are lost.
 */
class Log {
    enum Format { json, text }

    private static final int WAITING_LINES = 100;
    private static final Pattern SPECIAL = Pattern.compile("[\"\\\\\\x00-\\x1F]");
    private static final Path STDERR_OF_PID_1 = Path.of("/proc/1/fd/2");

    private final Format format;
    private final String prefix;
    private final boolean toPid1;
    private final ExecutorService writer = new ThreadPoolExecutor(1, 1, 0, TimeUnit.SECONDS,
            new ArrayBlockingQueue<>(WAITING_LINES), new ThreadPoolExecutor.DiscardPolicy());

    Log(Format format, String prefix, boolean toPid1) {
        this.format = format;
        this.prefix = prefix;
        this.toPid1 = toPid1;
    }

    /** Never throws. */
    void add(String level, Object message) {
        try {
            String text = (prefix.isEmpty() ? "" : prefix + " ") + message;
            Instant now = Instant.ofEpochSecond(System.currentTimeMillis() / 1000);
            String escaped = SPECIAL.matcher(text).replaceAll(
                    special -> String.format("\\\\u%04x", (int) special.group().charAt(0)));
            String line = format == Format.text ? text.replaceAll("\\p{Cntrl}", " ") : "{\"message\": \"" + escaped
                    + "\", \"timestamp\": \"" + now + "\", \"level\": \"" + level + "\"}";
            writer.execute(() -> write((line + "\n").getBytes(StandardCharsets.UTF_8)));
        } catch (Throwable e) { } // out of memory or threads, perhaps: without its log the hook still waits
    }

    /** Waits until all is written, at most 5 s. */
    void close() throws InterruptedException {
        writer.shutdown();
        writer.awaitTermination(5, TimeUnit.SECONDS);
    }

    private void write(byte[] line) {
        if (toPid1) {
            try (OutputStream out = new FileOutputStream(STDERR_OF_PID_1.toFile(), true)) {
                // With shareProcessNamespace PID 1 is "pause", and what it gets is seen nowhere.
                if (!Files.readSymbolicLink(STDERR_OF_PID_1).endsWith("null")) {
                    out.write(line);
                    return;
                }
            } catch (IOException e) { } // it belongs to another user, or is no file: the hook's own stderr is left
        }
        System.err.write(line, 0, line.length); // where that fails there is no other place
    }
}
