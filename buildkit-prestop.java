///usr/bin/env true; exec jbang "$0" "$@"

// buildkit-prestop: a Kubernetes preStop hook that waits for BuildKit's clients before it lets the pod stop.
//
// BuildKit does not wait for running builds when it gets SIGTERM (https://github.com/moby/buildkit/issues/4090).
// Kubernetes sends SIGTERM only when the preStop hook has ended, so this hook ends when the builds have.
//
// A client stays connected to buildkitd, to its TCP port or to its unix socket, for as long as it builds. The hook
// counts these connections again and again, and exits 0 once there was none for a while, the quiet time. It believes
// netstat, ss and the kernel's tables that somebody is connected. It believes the kernel's tables alone (or the source
// that the user named) that nobody is, and only if they show that buildkitd listens. All else is unknown, and unknown
// is not quiet. It cannot see clients outside of the pod that came over a shared socket file.

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
import java.net.InetAddress;
import java.nio.*;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.time.Instant;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.locks.LockSupport;
import java.util.regex.*;
import java.util.stream.Stream;
import picocli.CommandLine;
import picocli.CommandLine.*;

@Command(name = "buildkit-prestop", version = "buildkit-prestop 1.0.0", mixinStandardHelpOptions = true,
        sortOptions = false, showDefaultValues = true, exitCodeListHeading = "%nExit codes:%n",
        description = "Waits until no client has been connected to buildkitd for a while.",
        exitCodeList = {"0:quiet long enough (--once: could look)", "1:--once could not look", "2:bad command line",
            "124:gave up at MAX_WAIT_SECONDS"},
        footer = {"", "A flag wins over the environment. A bad flag ends the command. A bad value",
            "in the environment is logged, and the default is used."})
class BuildkitPrestop implements Callable<Integer> {
    @Option(names = "--port", defaultValue = "1234", paramLabel = "PORT", converter = Port.class,
            description = "port that buildkitd listens on, 1 to 65535 (BUILDKITD_PORT)") int port;
    @Option(names = "--socket", defaultValue = "buildkitd.sock", paramLabel = "PATH",
            description = "unix socket that buildkitd listens on: a path, or the end of one;"
                    + " empty: look at TCP only (BUILDKITD_SOCKET)") String socket;
    @Option(names = "--check-frequency-ms", defaultValue = "500", paramLabel = "MS", converter = AtLeastOne.class,
            description = "time between two checks, at least 1 (CHECK_FREQUENCY_MS)") int checkFrequencyMs;
    @Option(names = "--quiet-seconds", defaultValue = "10", paramLabel = "S", converter = AtLeastZero.class,
            description = "how long it must stay quiet, at least 0 (WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS)")
    int quietSeconds;
    @Option(names = "--max-wait-seconds", defaultValue = "0", paramLabel = "S", converter = AtLeastZero.class,
            description = "give up after this long; 0: no limit (MAX_WAIT_SECONDS)") int maxWaitSeconds;
    @Option(names = "--source", defaultValue = "auto", paramLabel = "NAME",
            description = "auto, or only netstat, ss or procfs (CONNECTION_SOURCE)") ConnectionSource source;
    @Option(names = "--log-format", defaultValue = "json", paramLabel = "NAME",
            description = "json or text (LOG_FORMAT)") Log.Format logFormat;
    @Option(names = "--log-prefix", defaultValue = "[PreStop Hook]", paramLabel = "TEXT",
            description = "put before each message; empty: no prefix (LOG_PREFIX)") String logPrefix;
    @Option(names = "--debug", description = "log every check (DEBUG: any value that is not empty)") boolean debug;
    @Option(names = "--sidecar", paramLabel = "FIFO",
            description = "stay, and serve readers of this FIFO: each gets a line when its wait is over") Path sidecar;
    @Option(names = "--once", description = "look once, print the number of active connections, exit") boolean once;

    static final int OK = 0, COULD_NOT_LOOK = 1, BAD_COMMAND_LINE = 2, GAVE_UP = 124; // the last as timeout(1) does
    private static final Pattern VARIABLE = Pattern.compile(".*\\(([A-Z_]+)\\)"); // each ends its flag's description

    boolean portIsNamed, socketIsNamed; // by the user, not by default
    Log log;
    private final List<String> badEnvironment = new ArrayList<>();
    @Spec private Model.CommandSpec spec;

    public static void main(String... args) {
        Runtime.getRuntime().addShutdownHook(new Thread(Tool::endAll));
        BuildkitPrestop hook = new BuildkitPrestop();
        CommandLine command = new CommandLine(hook).setExpandAtFiles(false);
        command.setParameterExceptionHandler((badFlag, rest) -> {
            command.getErr().println(badFlag.getMessage() + " (see --help)");
            return BAD_COMMAND_LINE;
        });
        System.exit(command.execute(hook.withEnvironment(command, args)));
    }

    @Override public Integer call() throws InterruptedException {
        // Nobody sees a hook's own stderr; what PID 1 writes there is what kubectl logs shows. --once has a terminal.
        log = new Log(logFormat, logPrefix, System.getenv("KUBERNETES_SERVICE_HOST") != null && !once);
        badEnvironment.forEach(message -> log.add("warning", message));
        debug |= !Objects.requireNonNullElse(System.getenv("DEBUG"), "").isEmpty();
        socket = socket.strip().replaceFirst("^unix://", ""); // as buildkitd's own addresses begin
        portIsNamed = spec.commandLine().getParseResult().hasMatchedOption("--port");
        socketIsNamed = spec.commandLine().getParseResult().hasMatchedOption("--socket");
        if (sidecar != null && !once) {
            new Sidecar(sidecar, () -> new Drain().waitUntilQuiet(), log).serve(); // never returns
        }
        int exitCode = once ? printCount() : new Drain().waitUntilQuiet();
        log.close();
        return exitCode;
    }

    private int printCount() {
        Sockets sockets = new Sockets(this);
        try {
            System.out.println(sockets.askAll().count());
            return OK;
        } catch (IOException e) {
            log.add("warning", sockets.describe(e) + ".");
            return COULD_NOT_LOOK;
        }
    }

    /** One wait, from its first look to its end. */
    class Drain {
        private static final long SIGN_OF_LIFE_MS = 60_000;
        private final Sockets sockets = new Sockets(BuildkitPrestop.this);
        private final long start = System.nanoTime();
        private String seen = "nothing is known"; // by the last look, in words
        private String reported; // the state that was logged last
        private long reportedMs;

        /** Returns the exit code: OK or GAVE_UP. */
        int waitUntilQuiet() throws InterruptedException {
            log.add("info", "Waiting for build processes to finish...");
            long quietMs = quietSeconds * 1000L;
            long checksNeeded = Math.max(1, (quietMs + checkFrequencyMs - 1) / checkFrequencyMs);
            long quietChecks = 0;
            long lastNotQuietMs = 0; // or the start
            while (true) {
                // While it stays quiet the judge (see Sockets) is enough, and cheaper. Before it leaves it asks all.
                boolean quiet = isQuiet(quietChecks == 0 || quietChecks + 1 >= checksNeeded);
                quietChecks = quiet ? quietChecks + 1 : 0;
                lastNotQuietMs = quiet ? lastNotQuietMs : waitedMs();
                // The checks alone are not enough: N of them have N - 1 sleeps between them.
                if (quietChecks >= checksNeeded && waitedMs() - lastNotQuietMs >= quietMs) {
                    log.add("info", "All build processes seem to have stopped. Exiting now.");
                    return OK;
                }
                long leftMs = maxWaitSeconds == 0 ? Long.MAX_VALUE : maxWaitSeconds * 1000L - waitedMs();
                Thread.sleep(Math.max(0, Math.min(checkFrequencyMs, leftMs)));
                if (leftMs < checkFrequencyMs) { // a look after a shorter sleep would be no check
                    log.add("warning", "Giving up after MAX_WAIT_SECONDS, " + maxWaitSeconds + " s: " + seen + ".");
                    return GAVE_UP;
                }
            }
        }

        private boolean isQuiet(boolean askAll) {
            try {
                return lookAndReport(askAll);
            } catch (Throwable e) {
                return false; // whatever failed, even the log: nobody knows then who is connected
            }
        }

        private boolean lookAndReport(boolean askAll) {
            try {
                Look look = askAll ? sockets.askAll() : sockets.askJudge();
                seen = sockets.describe(look);
                report("info", look.tcp().size() + " " + look.unix().size(), look.count());
                return look.count() == 0;
            } catch (IOException unknown) {
                seen = sockets.describe(unknown);
                report("warning", seen, "unknown");
                return false;
            }
        }

        /** Logs what was seen when the state is new, and once a minute as a sign of life. */
        private void report(String level, String state, Object count) {
            if (debug) { log.add("debug", "Active connections to buildkitd: " + count); }
            long waitedMs = waitedMs();
            boolean nextCheckIsTooLate = waitedMs + checkFrequencyMs > reportedMs + SIGN_OF_LIFE_MS;
            if (!state.equals(reported) || nextCheckIsTooLate) {
                log.add(level, seen + ". Waited " + waitedMs / 1000 + " s so far.");
                reported = state;
                reportedMs = waitedMs;
            }
        }

        private long waitedMs() { return TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - start); }
    }

    /** Adds the environment's settings, as "--flag=value", that args have not. Bad ones are warned of later. */
    private String[] withEnvironment(CommandLine command, String... args) {
        List<String> flags = new ArrayList<>(List.of(args));
        for (Model.OptionSpec option : command.getCommandSpec().options()) {
            Matcher variable = VARIABLE.matcher(String.join("", option.description()));
            String flag = option.longestName();
            if (!variable.matches() || Stream.of(args).anyMatch(arg -> arg.startsWith(flag))) { continue; }
            String value = System.getenv(variable.group(1));
            // BUILDKITD_PORT=tcp://... is set by Kubernetes itself, where there is a Service named buildkitd.
            if (value == null || flag.equals("--port") && value.startsWith("tcp://")) { continue; }
            try {
                command.parseArgs(flag + "=" + value); // on trial
            } catch (ParameterException e) {
                badEnvironment.add("Ignoring " + variable.group(1) + ", using " + option.defaultValue() + ". "
                        + e.getMessage() + ".");
                value = option.defaultValue(); // which still counts as named, so something must listen there
            }
            flags.add(flag + "=" + value);
        }
        return flags.toArray(String[]::new);
    }

    static class WholeNumber implements ITypeConverter<Integer> {
        private final int least, most;

        WholeNumber(int least, int most) { this.least = least; this.most = most; }

        @Override public Integer convert(String value) {
            String digits = value.strip();
            if (digits.matches("\\d{1,10}") && Long.parseLong(digits) >= least && Long.parseLong(digits) <= most) {
                return Integer.valueOf(digits);
            }
            throw new TypeConversionException("'" + value + "' is not a whole number from " + least + " to " + most);
        }
    }

    static class AtLeastZero extends WholeNumber { AtLeastZero() { super(0, Integer.MAX_VALUE); } }
    static class AtLeastOne extends WholeNumber { AtLeastOne() { super(1, Integer.MAX_VALUE); } }
    static class Port extends WholeNumber { Port() { super(1, 65535); } }

    enum ConnectionSource { auto, netstat, ss, procfs }
}

/**
 * Waits for others: the preStop hook of another container reads a line from a FIFO, see fifo(7), and gets it at the end
 * of a wait. A reader that gets the end of the file instead does not know who is connected, and has to ask again.
 */
record Sidecar(Path fifo, Callable<Integer> drain, Log log) {
    private static final long RETRY_MS = 1000;

    void serve() throws InterruptedException {
        String complaint = "";
        while (true) {
            try {
                makeFifo();
                log.add("info", "Ready: waiting for a reader of " + fifo + ".");
                // This blocks until somebody opens it for reading. WRITE alone makes no file where there is no FIFO.
                try (OutputStream reader = Files.newOutputStream(fifo, StandardOpenOption.WRITE)) {
                    Files.deleteIfExists(fifo); // so a probe sees that it drains, and the next reader starts a new wait
                    boolean quiet = drain.call() == BuildkitPrestop.OK;
                    reader.write((quiet ? "quiet\n" : "gave up\n").getBytes(StandardCharsets.UTF_8));
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

    /** Keeps one that is there. Nothing else will do: what is written to a file would stay for later readers. */
    private void makeFifo() throws Exception {
        Process shell = new ProcessBuilder("sh", "-c", "test -p \"$0\" || mkfifo -m 666 \"$0\"", fifo.toString())
                .redirectErrorStream(true).start();
        String complaint = new String(shell.getInputStream().readAllBytes(), StandardCharsets.UTF_8).strip();
        if (shell.waitFor() != 0) { throw new IOException(complaint); }
    }
}

/** Whom to ask who is connected, and whom to believe. */
class Sockets {
    private static final int MOST_PEERS = 5;

    private final BuildkitPrestop settings;
    private final Pattern socketPaths;
    private final List<Source> tools; // asked first: they can only make it stay
    private final Source judge; // it alone is believed that nobody is connected
    private final Set<Source> warnedOf = EnumSet.noneOf(Source.class);

    Sockets(BuildkitPrestop settings) {
        this.settings = settings;
        boolean auto = settings.source == BuildkitPrestop.ConnectionSource.auto;
        tools = new ArrayList<>(auto ? List.of(Source.netstat, Source.ss) : List.of());
        judge = auto ? Source.procfs : Source.valueOf(settings.source.name());
        // Characters beyond ASCII are all alike: in the C locale the JVM cannot read them from BUILDKITD_SOCKET.
        String path = Pattern.quote(settings.socket).replaceAll("[^ -~]+", "\\\\E[^ -~]+\\\\Q");
        socketPaths = Pattern.compile(settings.socket.isEmpty() ? "(?!)" : "(?s)(.*/)?" + path);
    }

    /** Throws an IOException that says why it is unknown who is connected. */
    Look askAll() throws IOException {
        // The first tool that works is asked. Not to be installed is no fault.
        for (Source tool : tools.stream().filter(tool -> Tool.find(tool.name()).isPresent()).toList()) {
            try {
                Look look = ask(tool);
                if (look.count() > 0) { return look; }
                break; // that it saw nobody proves nothing
            } catch (IOException e) {
                tools.remove(tool);
                tools.add(tool); // asked after the other from now on
                if (warnedOf.add(tool)) { settings.log.add("warning", "Could not use " + e.getMessage() + "."); }
            }
        }
        return askJudge();
    }

    /** Asks only the one that is believed that nobody is connected. Throws the same. */
    Look askJudge() throws IOException {
        Look look = ask(judge);
        // Who sees no listener cannot have looked at buildkitd. What the user named must listen, else one of the two.
        boolean noPort = look.tcpListeners().isEmpty(), noSocket = look.unixListeners().isEmpty();
        List<String> missing = new ArrayList<>();
        if (noPort && (noSocket || settings.portIsNamed)) { missing.add("port " + settings.port); }
        if (noSocket && (noPort || settings.socketIsNamed) && !settings.socket.isEmpty()) {
            missing.add(settings.socket);
        }
        if (look.count() == 0 && !missing.isEmpty()) {
            throw new IOException("nothing listens on " + String.join(" or ", missing));
        }
        return look;
    }

    Look newLook(Source source) { return new Look(source, settings.port, socketPaths); } // a test overrides it

    private Look ask(Source source) throws IOException {
        try {
            Look look = newLook(source);
            source.read(look);
            return look;
        } catch (Throwable e) { // out of memory, threads or file descriptors, perhaps
            throw new IOException(source + ": " + Objects.requireNonNullElse(e.getMessage(), e.toString()));
        }
    }

    String describe(Look look) throws IOException {
        int connections = look.tcp().size();
        List<String> peers = new ArrayList<>();
        for (String row : look.tcp().stream().limit(MOST_PEERS).toList()) { peers.add(look.source().peerOf(row)); }
        return connections + (connections == 1 ? " connection" : " connections") + " to port " + settings.port
                + (connections == 0 ? "" : " from " + String.join(", ", peers))
                + (connections == peers.size() ? "" : " and " + (connections - peers.size()) + " more")
                + (settings.socket.isEmpty() ? "" : " and " + look.unix().size() + " to " + settings.socket);
    }

    String describe(IOException unknown) {
        return "Cannot tell whether clients are connected to port " + settings.port
                + (settings.socket.isEmpty() ? "" : " or " + settings.socket) + ": " + unknown.getMessage();
    }
}

/**
 * What tells who is connected, and the form of its tables: these headings in this order, and behind them rows of TCP
 * and of unix sockets. A row is connected, or it listens, or it has another state. The patterns name every state.
 */
enum Source {
    /** See netstat(8). That of net-tools and that of BusyBox differ in blanks. */
    netstat(10, List.of("Active Internet connections.*", "Proto +Recv-Q +Send-Q +Local Address +Foreign Address +State",
            "Active UNIX domain sockets.*", "Proto +RefCnt +Flags +Type +State +I-Node +Path"),
            "tcp6? +\\d+ +\\d+ +(?<id>(?<local>\\S+:\\d+) +\\S+:[\\d*]+) +((?<connected>ESTABLISHED)|(?<listens>LISTEN)"
            + "|SYN_SENT|SYN_RECV|FIN_WAIT1|FIN_WAIT2|TIME_WAIT|CLOSE|CLOSE_WAIT|LAST_ACK|CLOSING|(?<unknown>\\S+))",
            // State and Path may be missing.
            "unix +\\d+ +\\[[A-Z ]*] +((?<connected>STREAM +CONNECTED)|(?<listens>STREAM +LISTENING)"
            + "|(STREAM|DGRAM|RAW|RDM|SEQPACKET)( +(FREE|LISTENING|CONNECTING|CONNECTED|DISCONNECTING))?"
            + "|(?<unknown>[A-Z]+( +[A-Z]+)?)) +(?<id>\\d+) *(?<path>.*)"),

    /** See ss(8). */
    ss(10, List.of("Netid +State +Recv-Q +Send-Q +Local Address:Port +Peer Address:Port *(Process)?"),
            "tcp +((?<connected>ESTAB)|(?<listens>LISTEN)|SYN-SENT|SYN-RECV|FIN-WAIT-1|FIN-WAIT-2|TIME-WAIT|UNCONN"
            + "|CLOSE-WAIT|LAST-ACK|CLOSING|(?<unknown>\\S+))"
            + " +\\d+ +\\d+ +(?<id>(?<local>\\S+:\\d+) +\\S+:[\\d*]+)",
            "((?<connected>u_str +ESTAB)|(?<listens>u_str +LISTEN)"
            + "|u_(str|dgr|seq) +(ESTAB|LISTEN|UNCONN|SYN-SENT|CLOSING)|(?<unknown>u_\\w+ +[A-Z0-9-]+))"
            + " +\\d+ +\\d+ +(?<path>\\S.*) (?<id>\\d+) +\\* \\d+"),

    /** See proc_pid_net(5). Numbers are hexadecimal; states are those of Linux' net/tcp_states.h and linux/net.h. */
    procfs(16, List.of("sl +local_address +rem(ote)?_address +st .*",
            "Num +RefCount +Protocol +Flags +Type +St +Inode +Path"),
            "\\d+: (?<id>(?<local>([0-9A-F]{32}|[0-9A-F]{8}):[0-9A-F]{4}) ([0-9A-F]{32}|[0-9A-F]{8}):[0-9A-F]{4})"
            + " ((?<connected>01)|(?<listens>0A)|0[2-9B]|(?<unknown>\\w+)) .*",
            "\\w+: \\w{8} \\w{8} ((?<connected>\\w{8} 0001 03)|(?<listens>00010000 0001 01)|\\w{8} 000[1-5] 0[0-4]"
            + "|(?<unknown>\\w{8} \\w{4} \\w+)) +(?<id>\\d+) ?(?<path>.*)");

    /** Absent where the kernel has no IPv6. What is there and cannot be seen is not absent. */
    private static final Path TCP6 = Path.of("/proc/net/tcp6");

    private final int base; // of the numbers of ports
    final List<Pattern> headings;
    final Pattern tcpRow, unixRow;

    Source(int base, List<String> headings, String tcpRow, String unixRow) {
        this.base = base;
        this.headings = headings.stream().map(Pattern::compile).toList();
        this.tcpRow = Pattern.compile(tcpRow);
        this.unixRow = Pattern.compile(unixRow, Pattern.DOTALL);
    }

    /** Reads its tables, whole, or throws an IOException. */
    void read(Look look) throws IOException {
        if (this != procfs) {
            Tool.run(name(), look, headings);
            return;
        }
        for (Path file : List.of(Path.of("/proc/net/tcp"), TCP6, Path.of("/proc/net/unix"))) {
            if (file == TCP6 && Files.notExists(TCP6)) { continue; }
            try (InputStream in = new FileInputStream(file.toFile())) {
                look.read(in::read, List.of(headings.get(file.endsWith("unix") ? 1 : 0)));
            }
        }
    }

    /** Whether it is BusyBox' remark that there is no table of IPv6, where there is none. */
    static boolean isNoFault(String line) {
        return line.matches("netstat: .*/proc/net/tcp6.*: No such file or directory") && Files.notExists(TCP6);
    }

    int portOf(String endpoint) { return Integer.parseInt(endpoint.substring(endpoint.lastIndexOf(':') + 1), base); }

    /** The client's end as people write it, 10.0.0.7:41234 or [2001:db8::7]:41234, whatever the source. */
    String peerOf(String endpoints) throws IOException {
        String address = endpoints.substring(endpoints.lastIndexOf(' ') + 1, endpoints.lastIndexOf(':'));
        if (this == procfs) { // in words of 32 bits, see Documentation/networking/proc_net_tcp.rst of Linux
            ByteBuffer bytes = ByteBuffer.allocate(address.length() / 2).order(ByteOrder.nativeOrder());
            for (String word : address.split("(?<=\\G.{8})")) { bytes.putInt(Integer.parseUnsignedInt(word, 16)); }
            address = InetAddress.getByAddress(bytes.array()).getHostAddress().replaceFirst("(^|:)0(:0)+(:|$)", "::");
        }
        address = address.replaceAll("^\\[?::ffff:(?=.*\\.)|[\\[\\]]", "");
        return (address.contains(":") ? "[" + address + "]" : address) + ":" + portOf(endpoints);
    }
}

/**
 * What the tables of one source show of buildkitd: its connections and listeners. Those of TCP are known by both their
 * ends, because the kernel may show a row twice, and those of unix sockets by their inodes.
 */
record Look(Source source, int port, Pattern socketPaths, Set<String> tcp, Set<String> unix, Set<String> tcpListeners,
        Set<String> unixListeners) {
    private static final int CHUNK = 4096; // bytes: longer than any line, and little beside tables of megabytes

    Look(Source source, int port, Pattern socketPaths) {
        this(source, port, socketPaths, new LinkedHashSet<>(), new HashSet<>(), new HashSet<>(), new HashSet<>());
    }

    /** Bytes as InputStream.read(byte[]) gives them. */
    interface ByteSource { int read(byte[] buffer) throws IOException; }

    int count() { return tcp.size() + unix.size(); }

    /** Throws an IOException if this is anything but these headings and rows, whole to the end. */
    void read(ByteSource in, List<Pattern> headings) throws IOException {
        Deque<Pattern> missing = new ArrayDeque<>(headings);
        byte[] chunk = new byte[CHUNK];
        String rest = "";
        for (int n; (n = in.read(chunk)) > 0; ) {
            String text = rest + new String(chunk, 0, n, StandardCharsets.ISO_8859_1);
            int start = 0;
            for (int end; (end = text.indexOf('\n', start)) >= 0; start = end + 1) {
                String line = text.substring(start, end).strip();
                if (!missing.isEmpty() && missing.element().matcher(line).matches()) {
                    missing.remove();
                } else if (!addRow(line) && !Source.isNoFault(line)) {
                    throw notATable(line);
                }
            }
            rest = text.substring(start);
            if (rest.length() > CHUNK) { throw notATable(rest); }
        }
        if (!rest.isEmpty() || !missing.isEmpty()) { throw notATable("it ends too early"); }
    }

    private static IOException notATable(String why) {
        return new IOException(String.format("not a socket table: %.100s", why));
    }

    /** Keeps what a row tells of buildkitd. False: it is no row, or one of buildkitd's in an unknown state. */
    private boolean addRow(String line) {
        Matcher row = source.tcpRow.matcher(line);
        if (row.matches()) {
            return source.portOf(row.group("local")) != port || keep(row, tcp, tcpListeners);
        }
        row = source.unixRow.matcher(line);
        return row.matches()
                && (!socketPaths.matcher(row.group("path")).matches() || keep(row, unix, unixListeners));
    }

    private static boolean keep(Matcher row, Set<String> connections, Set<String> listeners) {
        if (row.group("connected") != null) {
            connections.add(row.group("id"));
        } else if (row.group("listens") != null) {
            listeners.add(row.group("id"));
        }
        return row.group("unknown") == null;
    }
}

/** Runs netstat and ss. */
class Tool {
    private static final long LIMIT_NS = 5_000_000_000L;
    private static final long POLL_NS = 2_000_000;
    private static final Semaphore MAY_START = new Semaphore(1);

    /** Throws an IOException if the command is missing, fails, prints no whole tables, or takes longer than 5 s. */
    static void run(String command, Look look, List<Pattern> headings) throws IOException {
        File file = find(command).orElseThrow(() -> new IOException("not on the PATH"));
        ProcessBuilder builder = new ProcessBuilder(file.getPath(), "-tanx").redirectErrorStream(true)
                .redirectInput(ProcessBuilder.Redirect.INHERIT); // one pipe less to make
        builder.environment().put("LC_ALL", "C"); // net-tools translates its output
        Process process;
        MAY_START.acquireUninterruptibly();
        try { process = builder.start(); } finally { MAY_START.release(); }
        Look.ByteSource output = outputOf(process);
        try {
            look.read(output, headings);
        } catch (IOException e) {
            while (output.read(new byte[4096]) > 0) { } // until it exits, for its status; throws after 5 s
            throw new IOException("exit status " + process.exitValue() + ", " + e.getMessage());
        } finally {
            if (process.isAlive()) {
                Stream.concat(process.descendants(), Stream.of(process.toHandle()))
                        .forEach(ProcessHandle::destroyForcibly);
            }
        }
        if (process.exitValue() != 0) { throw new IOException("exit status " + process.exitValue()); }
    }

    static Optional<File> find(String command) {
        String path = Objects.requireNonNullElse(System.getenv("PATH"), "/usr/sbin:/usr/bin:/sbin:/bin");
        return Stream.of(path.split(":")).map(directory -> new File(directory, command))
                .filter(file -> file.canExecute() && !file.isDirectory()).findFirst();
    }

    /** What the process prints, until it exits. A read that blocks would not end while a child holds the pipe. */
    private static Look.ByteSource outputOf(Process process) {
        InputStream pipe = process.getInputStream();
        long start = System.nanoTime();
        return buffer -> {
            while (System.nanoTime() - start < LIMIT_NS) {
                boolean exited = !process.isAlive(); // asked before the pipe: then an empty pipe stays empty
                if (pipe.available() > 0) { return pipe.read(buffer); }
                if (exited) { return -1; }
                LockSupport.parkNanos(POLL_NS);
            }
            throw new IOException("no answer in " + TimeUnit.NANOSECONDS.toSeconds(LIMIT_NS) + " s");
        };
    }

    /** A tool that hangs when SIGTERM arrives must not outlive the hook. MAY_START is never free again. */
    static void endAll() {
        MAY_START.acquireUninterruptibly();
        ProcessHandle.current().descendants().forEach(ProcessHandle::destroyForcibly);
    }
}

/**
 * Writes lines where they can be seen. Writing to a pipe that nobody reads never ends, so a thread of its own does it:
 * a hundred lines may wait for it, and those that cannot be written are lost.
 */
record Log(Format format, String prefix, boolean toPid1, ExecutorService writer) {
    enum Format { json, text }

    private static final int WAITING_LINES = 100;
    private static final Pattern SPECIAL = Pattern.compile("[\"\\\\\\x00-\\x1F]");
    private static final Path STDERR_OF_PID_1 = Path.of("/proc/1/fd/2");

    Log(Format format, String prefix, boolean toPid1) {
        this(format, prefix, toPid1, new ThreadPoolExecutor(1, 1, 0, TimeUnit.SECONDS,
                new ArrayBlockingQueue<>(WAITING_LINES), new ThreadPoolExecutor.DiscardPolicy()));
    }

    void add(String level, String message) {
        String text = prefix.isEmpty() ? message : prefix + " " + message;
        Instant now = Instant.ofEpochSecond(System.currentTimeMillis() / 1000);
        String escaped = SPECIAL.matcher(text).replaceAll(
                special -> String.format("\\\\u%04x", (int) special.group().charAt(0)));
        String line = format == Format.text ? text.replaceAll("\\p{Cntrl}", " ")
                : "{\"message\": \"" + escaped + "\", \"timestamp\": \"" + now + "\", \"level\": \"" + level + "\"}";
        try {
            writer.execute(() -> write((line + "\n").getBytes(StandardCharsets.UTF_8)));
        } catch (OutOfMemoryError e) { } // there can be no thread for it: without its log the hook still waits
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
