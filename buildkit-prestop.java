///usr/bin/env true; exec jbang "$0" "$@"
//JAVA 17+
//DEPS info.picocli:picocli:4.7.7
//JAVAC_OPTIONS -XDstringConcat=inline
//JAVA_OPTIONS -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:CompileThresholdScaling=100 -XX:-UsePerfData
//JAVA_OPTIONS -Xms2m -Xmx32m -Xmn1m --limit-modules=java.se,jdk.management.agent,jdk.unsupported
//JAVA_OPTIONS -XX:+IgnoreUnrecognizedVMOptions -XX:-UseG1GC -XX:-UseParallelGC -XX:-UseZGC -XX:-UseShenandoahGC

// buildkit-prestop: a Kubernetes preStop hook that waits for BuildKit's clients before it lets the pod stop.
//
// BuildKit does not wait for running builds when it gets SIGTERM (https://github.com/moby/buildkit/issues/4090).
// Kubernetes sends SIGTERM only when the preStop hook has ended, so this hook ends when the builds have.
//
// A client is connected to buildkitd, to its TCP port or to its unix socket, for as long as it builds. The hook counts
// these connections again and again, and exits 0 once there was none for the quiet time. It asks netstat, ss or procfs,
// whichever works. "Could not look" is never "no connection": then the hook goes on waiting.
//
// The options above keep the JVM small, as it runs beside the builds: the serial collector with 1 MB for new objects
// (7.5 MiB less), the quick compiler alone and only for the busiest loops (4 MiB), few of the JDK's modules (2 MiB), no
// generated classes to join strings, and no file in /tmp, which may be read-only. The heap needs 2 MB; 32 are for an
// environment of megabytes. The last line is for images whose JAVA_TOOL_OPTIONS name another collector.

import java.io.*;
import java.net.InetAddress;
import java.nio.*;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.time.Instant;
import java.util.*;
import java.util.concurrent.*;
import java.util.regex.*;
import java.util.stream.Stream;
import picocli.CommandLine;
import picocli.CommandLine.*;

@Command(name = "buildkit-prestop", version = "buildkit-prestop 1.0.0", mixinStandardHelpOptions = true,
        sortOptions = false, showDefaultValues = true,
        description = "Waits until no client has been connected to buildkitd for a while.",
        exitCodeListHeading = "%nExit codes:%n",
        exitCodeList = {"0:quiet long enough (--once: could look)",
            "1:gave up at MAX_WAIT_SECONDS (--once: could not look)", "2:bad command line"},
        footer = {"", "A flag wins over the environment. A bad flag ends the command. A bad value",
            "in the environment is logged, and the default is used."})
class BuildkitPrestop implements Callable<Integer> {

    // The descriptionKey of an option is the environment variable behind it.

    @Option(names = "--port", descriptionKey = "BUILDKITD_PORT", defaultValue = "1234", paramLabel = "PORT",
            converter = Port.class, description = "port that buildkitd listens on, 1 to 65535 (BUILDKITD_PORT)")
    int port;
    @Option(names = "--socket", descriptionKey = "BUILDKITD_SOCKET", defaultValue = "buildkitd.sock",
            paramLabel = "PATH", description = "unix socket that buildkitd listens on: a path, or the end of one;"
                    + " empty: look at TCP only (BUILDKITD_SOCKET)")
    String socket;
    @Option(names = "--check-frequency-ms", descriptionKey = "CHECK_FREQUENCY_MS", defaultValue = "500",
            converter = AtLeastOne.class, paramLabel = "MS",
            description = "time between two checks, at least 1 (CHECK_FREQUENCY_MS)")
    int checkFrequencyMs;
    @Option(names = "--quiet-seconds", descriptionKey = "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS",
            defaultValue = "10", paramLabel = "S", converter = AtLeastZero.class,
            description = "how long it must stay quiet, at least 0 (WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS)")
    int quietSeconds;
    @Option(names = "--max-wait-seconds", descriptionKey = "MAX_WAIT_SECONDS", defaultValue = "0",
            paramLabel = "S", converter = AtLeastZero.class,
            description = "give up after this long, so that buildkitd still gets its SIGTERM inside"
                    + " terminationGracePeriodSeconds; 0: no limit (MAX_WAIT_SECONDS)")
    int maxWaitSeconds;
    @Option(names = "--source", descriptionKey = "CONNECTION_SOURCE", defaultValue = "auto", paramLabel = "NAME",
            description = "auto, or only netstat, ss or procfs (CONNECTION_SOURCE)")
    Source source;
    @Option(names = "--log-format", descriptionKey = "LOG_FORMAT", defaultValue = "json", paramLabel = "NAME",
            description = "json or text (LOG_FORMAT)")
    Log.Format logFormat;
    @Option(names = "--log-prefix", descriptionKey = "LOG_PREFIX", defaultValue = "[PreStop Hook]",
            paramLabel = "TEXT", description = "put before each message; empty: no prefix (LOG_PREFIX)")
    String logPrefix;
    @Option(names = "--debug", description = "log every check (DEBUG: any value that is not empty)")
    boolean debug;
    @Option(names = "--once", description = "look once, print the number of active connections, exit")
    boolean once;

    private final List<String> badEnvironment = new ArrayList<>();
    private final Set<Source> warnedOf = EnumSet.noneOf(Source.class);
    private boolean listenersChecked;
    private String reportedCounts;
    private long reportedMs;
    Sockets sockets;
    Log log;

    public static void main(String... args) {
        Runtime.getRuntime().addShutdownHook(new Thread(Tool::endAll));
        BuildkitPrestop hook = new BuildkitPrestop();
        CommandLine command = new CommandLine(hook).setParameterExceptionHandler((badFlag, rest) -> {
            badFlag.getCommandLine().getErr().println(badFlag.getMessage() + " (see --help)");
            return 2;
        });
        Stream<String> flags = Stream.concat(hook.environmentAsFlags(command, args), Stream.of(args));
        System.exit(command.execute(flags.toArray(String[]::new)));
    }

    @Override
    public Integer call() throws InterruptedException {
        // Nobody sees a hook's own stderr; what PID 1 writes there is what kubectl logs shows. --once has a terminal.
        log = new Log(logFormat, logPrefix, System.getenv("KUBERNETES_SERVICE_HOST") != null && !once);
        socket = socket.strip().replaceFirst("^unix://", ""); // which addresses of buildkitd begin with
        sockets = new Sockets(port, socket, source);
        debug |= !Objects.requireNonNullElse(System.getenv("DEBUG"), "").isEmpty();
        badEnvironment.forEach(message -> log.add("warning", message));
        int exitCode = once ? printCount() : waitUntilQuiet();
        log.close();
        return exitCode;
    }

    private int printCount() {
        Connections seen = sockets.look();
        if (seen == null) {
            log.add("warning", describe(null) + ".");
            return 1;
        }
        warn(seen);
        System.out.println(seen.count());
        return 0;
    }

    /** Returns the exit code. Where a look gives null it is unknown who is connected, and unknown is not quiet. */
    int waitUntilQuiet() throws InterruptedException {
        log.add("info", "Waiting for build processes to finish...");
        long checksNeeded = Math.max(1, (quietSeconds * 1000L + checkFrequencyMs - 1) / checkFrequencyMs);
        long quietChecks = 0;
        long start = System.nanoTime();
        while (true) {
            Connections seen = null;
            boolean quiet = false;
            try {
                seen = sockets.look();
                report(seen, millisSince(start));
                quiet = seen != null && seen.count() == 0;
            } catch (Throwable e) {
                // no memory for the report, perhaps: whatever it is, it is not quiet
            }
            quietChecks = quiet ? quietChecks + 1 : 0;
            // So many checks after one that was not quiet take the quiet time; from the start they take one sleep less.
            if (quietChecks >= checksNeeded && millisSince(start) >= quietSeconds * 1000L) {
                log.add("info", "All build processes seem to have stopped. Exiting now.");
                return 0;
            }
            long leftMs = maxWaitSeconds == 0 ? Long.MAX_VALUE : maxWaitSeconds * 1000L - millisSince(start);
            Thread.sleep(Math.max(0, Math.min(checkFrequencyMs, leftMs)));
            if (leftMs < checkFrequencyMs) { // a look after a shorter sleep would be no check
                log.add("warning", "Giving up after MAX_WAIT_SECONDS, " + maxWaitSeconds + " s: " + describe(seen)
                        + ".");
                return 1;
            }
        }
    }

    private static long millisSince(long nanoTime) {
        return TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - nanoTime);
    }

    /** Logs each change, and a sign of life every minute. */
    private void report(Connections seen, long waitedMs) {
        if (seen != null) {
            warn(seen);
        }
        if (debug) {
            log.add("debug", "Active connections to buildkitd: " + (seen == null ? "unknown" : seen.count()));
        }
        String counts = seen == null ? "unknown" : seen.tcp + " " + seen.unix.size();
        boolean nextCheckIsTooLate = waitedMs + checkFrequencyMs > reportedMs + 60_000;
        if (!counts.equals(reportedCounts) || nextCheckIsTooLate) {
            log.add(seen == null ? "warning" : "info", describe(seen) + ". Waited " + waitedMs / 1000 + " s so far.");
            reportedCounts = counts;
            reportedMs = waitedMs;
        }
    }

    /** Logs what may be wrong although something was seen: a source that failed, and at the start the port. */
    private void warn(Connections seen) {
        for (Source failed : sockets.failures.keySet()) {
            if (!sockets.missing.contains(failed) && warnedOf.add(failed)) {
                log.add("warning", "Could not use " + sockets.failures.get(failed) + ".");
            }
        }
        if (!listenersChecked && !seen.portListens) {
            log.add("warning", "Nothing listens on port " + port + (seen.socketListens ? ", only on " + socket : "")
                    + ". Is BUILDKITD_PORT right?");
        }
        listenersChecked = true;
    }

    private String describe(Connections seen) {
        if (seen == null) {
            return "Cannot tell whether clients are connected to port " + port
                    + (socket.isEmpty() ? "" : " or " + socket) + ": " + String.join("; ", sockets.failures.values());
        }
        int unnamed = seen.tcp - seen.peers.size();
        return seen.tcp + (seen.tcp == 1 ? " connection" : " connections") + " to port " + port
                + (seen.tcp == 0 ? "" : " from " + String.join(", ", seen.peers))
                + (unnamed == 0 ? "" : " and " + unnamed + " more")
                + (socket.isEmpty() ? "" : " and " + seen.unix.size() + " to " + socket);
    }

    /** The environment's settings, but for those in args, as "--flag=value". Bad ones are warned of later. */
    private Stream<String> environmentAsFlags(CommandLine command, String... args) {
        List<String> flags = new ArrayList<>();
        for (Model.OptionSpec option : command.getCommandSpec().options()) {
            String variable = option.descriptionKey();
            boolean wanted = variable != null && Stream.of(args).noneMatch(arg -> arg.startsWith(option.longestName()));
            String value = wanted ? System.getenv(variable) : null;
            // Kubernetes itself sets BUILDKITD_PORT to such a value where there is a Service named buildkitd.
            if (value != null && !(variable.equals("BUILDKITD_PORT") && value.startsWith("tcp://"))) {
                try {
                    String flag = option.longestName() + "=" + value;
                    command.parseArgs(flag); // on trial
                    flags.add(flag);
                } catch (ParameterException e) {
                    badEnvironment.add("Ignoring " + variable + ", using " + option.defaultValue() + ". "
                            + e.getMessage() + ".");
                }
            }
        }
        return flags.stream();
    }

    static class AtLeastZero implements ITypeConverter<Integer> {
        int least = 0;
        int most = Integer.MAX_VALUE;

        @Override
        public Integer convert(String value) {
            String digits = value.strip();
            if (digits.matches("\\d{1,10}") && Long.parseLong(digits) >= least && Long.parseLong(digits) <= most) {
                return Integer.valueOf(digits);
            }
            throw new TypeConversionException("'" + value + "' is not a whole number from " + least + " to " + most);
        }
    }

    static class AtLeastOne extends AtLeastZero { AtLeastOne() { least = 1; } }
    static class Port extends AtLeastOne { Port() { most = 65535; } }
}

// ---- Looking -------------------------------------------------------------------------------------------------------

/** What one look has seen of buildkitd's sockets. */
class Connections {
    int tcp;
    final Set<String> unix = new HashSet<>(); // the inodes of buildkitd's ends
    final Set<String> peers = new LinkedHashSet<>(); // address:port of the first clients
    boolean portListens;
    boolean socketListens;
    /** Both ends of the latest: when a table grows while it is read, the kernel shows some rows once more. */
    private final Set<String> latest = new HashSet<>();

    boolean addTcp(String ends) {
        boolean isNew = latest.add(ends);
        tcp += isNew ? 1 : 0;
        if (latest.size() > 200) {
            latest.clear(); // those shown again follow close behind, and one too many costs no build
        }
        return isNew;
    }

    int count() {
        return tcp + unix.size();
    }
}

enum Source { auto, netstat, ss, procfs }

/** The ways of looking at the sockets of one port and one socket file. */
class Sockets {
    private static final File TCP = new File("/proc/net/tcp");
    private static final File TCP6 = new File("/proc/net/tcp6");
    private static final File UNIX = new File("/proc/net/unix");

    /** Why sources did not work in the last look. */
    final Map<Source, String> failures = new EnumMap<>(Source.class);
    /** Those of them that are not installed, which is no fault. */
    final Set<Source> missing = EnumSet.noneOf(Source.class);

    private final int port;
    private final String socket;
    final Pattern paths; // those of the socket
    private final List<Source> sources = new ArrayList<>(List.of(Source.netstat, Source.ss, Source.procfs));

    /** The socket is a path, the end of one, or empty: TCP only. The source auto is the first that works. */
    Sockets(int port, String socket, Source source) {
        this.port = port;
        this.socket = socket;
        // Beyond ASCII all characters are alike, because the C locale has cost the JVM those of BUILDKITD_SOCKET.
        paths = Pattern.compile("(?s)(.*/)?\\Q" + socket.replaceAll("[^ -~]+", "\\\\E[^ -~]+\\\\Q") + "\\E");
        if (source != Source.auto) {
            sources.retainAll(List.of(source));
        }
    }

    /** Asks the sources in turn, those that failed before last. Null when they could not tell. */
    Connections look() {
        failures.clear();
        missing.clear();
        Connections seen = null;
        for (Source source : List.copyOf(sources)) {
            try {
                seen = ask(source);
                if (seen.count() > 0 || seen.portListens || seen.socketListens) {
                    return seen;
                }
                // A wrong port looks like this, but so does a source that sees nothing at all: the others are asked.
            } catch (Throwable e) { // out of memory, threads or file descriptors: whatever it is, it is not quiet
                failures.put(source, source + ": " + Objects.requireNonNullElse(e.getMessage(), e.toString()));
                if (e instanceof NoSuchFileException) {
                    missing.add(source);
                }
                sources.remove(source);
                sources.add(source);
            }
        }
        return missing.containsAll(failures.keySet()) ? seen : null;
    }

    Connections ask(Source source) throws Exception {
        boolean tcpOnly = socket.isEmpty();
        List<File> files = new ArrayList<>();
        for (File file : tcpOnly ? List.of(TCP, TCP6) : List.of(TCP, TCP6, UNIX)) {
            if (file.canRead()) {
                files.add(file);
            } else if (file != TCP6 || !Files.notExists(file.toPath())) { // then the tools would show empty tables
                throw new IOException("no access to " + file);
            }
        }
        Tables tables = new Tables(source, port, paths);
        String options = tcpOnly ? "-tan" : "-tanx";
        if (source == Source.netstat && socket.contains(" ")) {
            throw new IOException("net-tools shows a path only up to its first blank");
        }
        switch (source) {
            case netstat -> Tool.run(tables, tcpOnly ? Tables.NETSTAT_TCP : Tables.NETSTAT, "netstat", options);
            case ss -> Tool.run(tables, tcpOnly ? Tables.SS_TCP : Tables.SS, "ss", options);
            default -> {
                for (File file : files) {
                    try (InputStream in = new FileInputStream(file)) {
                        tables.read(in::read, file == UNIX ? Tables.PROCFS_UNIX : Tables.PROCFS_TCP);
                    }
                }
            }
        }
        return tables.seen();
    }
}

/** The commands among the sources. */
class Tool {
    private static final Map<String, File> FOUND = new HashMap<>();
    private static final Semaphore MAY_START = new Semaphore(1);

    static void run(Tables tables, List<Pattern> headings, String... command) throws Exception {
        command[0] = onPath(command[0]);
        ProcessBuilder builder = new ProcessBuilder(command).redirectErrorStream(true)
                .redirectInput(ProcessBuilder.Redirect.INHERIT); // one pipe less to make
        builder.environment().put("LC_ALL", "C"); // net-tools translates its output
        Process process;
        MAY_START.acquireUninterruptibly();
        try {
            process = builder.start();
        } finally {
            MAY_START.release();
        }
        try {
            tables.read(outputOf(process), headings);
            if (process.exitValue() != 0) {
                throw new IOException("exit status " + process.exitValue());
            }
        } finally {
            if (process.isAlive()) {
                Stream.concat(process.descendants(), Stream.of(process.toHandle()))
                        .forEach(ProcessHandle::destroyForcibly);
            }
        }
    }

    private static String onPath(String tool) throws NoSuchFileException {
        if (!FOUND.containsKey(tool) || !FOUND.get(tool).canExecute()) { // not yet, or no longer
            String path = Objects.requireNonNullElse(System.getenv("PATH"), "/usr/sbin:/usr/bin:/sbin:/bin");
            FOUND.put(tool, Stream.of(path.split(":")).map(directory -> new File(directory, tool))
                    .filter(file -> file.canExecute() && !file.isDirectory())
                    .findFirst().orElseThrow(() -> new NoSuchFileException("not on the PATH")));
        }
        return FOUND.get(tool).getPath();
    }

    /** What the process prints, until it exits, for at most 5 s. Does not block, even where a child holds the pipe. */
    private static Tables.ByteSource outputOf(Process process) {
        InputStream out = process.getInputStream();
        long start = System.nanoTime();
        return buffer -> {
            while (System.nanoTime() - start < 5_000_000_000L) {
                boolean exited = !process.isAlive(); // asked before the pipe: then an empty pipe stays empty
                if (out.available() > 0) {
                    return out.read(buffer);
                }
                if (exited) {
                    return -1;
                }
                Thread.sleep(2); // not waitFor: the lock it takes would stay in the JVM, 200 bytes per check
            }
            throw new IOException("no answer in 5 s");
        };
    }

    /** A tool that hangs when SIGTERM arrives must not outlive the hook, and none may be started after it. */
    static void endAll() {
        MAY_START.acquireUninterruptibly();
        ProcessHandle.current().descendants().forEach(ProcessHandle::destroyForcibly);
    }
}

/**
 * The tables of a source, as netstat(8), ss(8) or proc_pid_net(5) describe them: these headings in this order, rows
 * behind them, and nothing else.
 */
record Tables(Source source, String port, Pattern paths, Connections seen) {
    static final List<Pattern> NETSTAT = Stream.of(
            "Active Internet connections.*", "Proto +Recv-Q +Send-Q +Local Address +Foreign Address +State",
            "Active UNIX domain sockets.*", "Proto +RefCnt +Flags +Type +State +I-Node +Path")
            .map(Pattern::compile).toList();
    static final List<Pattern> NETSTAT_TCP = NETSTAT.subList(0, 2);
    static final List<Pattern> SS_TCP = List.of(Pattern.compile(
            "State +Recv-Q +Send-Q +Local Address:Port +Peer Address:Port *(Process)?"));
    static final List<Pattern> SS = List.of(Pattern.compile("Netid +" + SS_TCP.get(0)));
    static final List<Pattern> PROCFS_TCP = List.of(Pattern.compile("sl +local_address +rem(ote)?_address +st .*"));
    static final List<Pattern> PROCFS_UNIX = List.of(Pattern.compile(
            "Num +RefCount +Protocol +Flags +Type +St +Inode +Path"));

    // The rows of unix sockets. Their state and path may be missing, and the path may hold blanks.
    private static final Pattern NETSTAT_ROW = Pattern.compile("unix +\\d+ +\\[[A-Z ]*] +"
            + "((?<connected>STREAM +CONNECTED)|(?<listening>STREAM +LISTENING)|[A-Z]+( +[A-Z]+)?)"
            + " +(?<inode>\\d+) *(?<path>.*)", Pattern.DOTALL);
    private static final Pattern SS_ROW = Pattern.compile(
            "((?<connected>u_str +ESTAB)|(?<listening>u_str +LISTEN)|u_\\w+ +[A-Z0-9-]+)"
            + " +\\d+ +\\d+ +(?<path>\\S.*) (?<inode>\\d+) +\\* \\d+", Pattern.DOTALL);
    private static final Pattern PROCFS_ROW = Pattern.compile("\\S+: \\w{8} \\w{8} "
            + "((?<connected>\\w{8} 0001 03)|(?<listening>00010000 0001 01)|\\w{8} \\w{4} \\w\\w)"
            + " +(?<inode>\\d+) ?(?<path>.*)", Pattern.DOTALL);

    private static final Set<String> ESTABLISHED = Set.of("ESTABLISHED", "ESTAB", "01");
    private static final Set<String> LISTENING = Set.of("LISTEN", "0A");

    Tables(Source source, int port, Pattern paths) {
        this(source, source == Source.procfs ? String.format(":%04X", port) : ":" + port, paths, new Connections());
    }

    /** Bytes as InputStream.read(byte[]) gives them. */
    interface ByteSource {
        int read(byte[] buffer) throws Exception;
    }

    /** Throws an IOException if this is anything but tables with these headings, whole to the end. */
    void read(ByteSource in, List<Pattern> headings) throws Exception {
        Deque<Pattern> missing = new ArrayDeque<>(headings);
        byte[] chunk = new byte[4096]; // small, because the tables of 10,000 connections are megabytes
        String rest = "";
        for (int n; rest.length() < chunk.length && (n = in.read(chunk)) > 0; ) {
            String[] lines = (rest + new String(chunk, 0, n, StandardCharsets.ISO_8859_1)).split("\n", -1);
            rest = lines[lines.length - 1];
            for (int i = 0; i < lines.length - 1; i++) {
                String line = lines[i];
                if (!missing.isEmpty() && missing.element().matcher(line.strip()).matches()) {
                    missing.remove();
                } else if (!addRow(line)) {
                    throw new IOException(String.format("not a socket table: %.100s", line));
                }
            }
        }
        if (!rest.isEmpty() || !missing.isEmpty()) {
            throw new IOException("not a socket table: the end came too early");
        }
    }

    /** Adds what the row tells. False: it is no row. */
    private boolean addRow(String line) throws IOException {
        String[] words = {"", "", "", "", "", ""};
        for (int i = 0, start = 0; i < (source == Source.procfs ? 4 : 6) && start < line.length(); ) {
            int end = line.indexOf(' ', start);
            end = end < 0 ? line.length() : end;
            if (end > start) {
                words[i++] = line.substring(start, end);
            }
            start = end + 1;
        }
        return switch (source) {
            // Proto Recv-Q Send-Q Local-Address Foreign-Address State
            case netstat -> line.startsWith("tcp") ? addTcp(words[3], words[4], words[5])
                    : addUnix(NETSTAT_ROW.matcher(line.strip()));
            // Netid State Recv-Q Send-Q Local-Address:Port Peer-Address:Port, the first not where it is TCP only
            case ss -> line.startsWith("u_") ? addUnix(SS_ROW.matcher(line.strip()))
                    : line.startsWith("tcp") ? addTcp(words[4], words[5], words[1])
                    : addTcp(words[3], words[4], words[0]);
            // sl local_address rem_address st
            default -> words[1].contains(":") ? addTcp(words[1], words[2], words[3])
                    : addUnix(PROCFS_ROW.matcher(line.strip()));
        };
    }

    private boolean addTcp(String local, String peer, String state) throws IOException {
        if (!local.endsWith(port) || !peer.contains(":")) {
            return local.contains(":") && peer.contains(":") && !state.isEmpty();
        }
        seen.portListens |= LISTENING.contains(state);
        if (ESTABLISHED.contains(state) && seen.addTcp(local.concat(peer)) && seen.peers.size() < 5) {
            seen.peers.add(nameOf(peer));
        }
        return ESTABLISHED.contains(state) || LISTENING.contains(state) || state.matches("[A-Z0-9_-]+");
    }

    private boolean addUnix(Matcher row) {
        boolean isRow = row.matches();
        if (isRow && paths.matcher(row.group("path")).matches()) {
            seen.socketListens |= row.group("listening") != null;
            if (row.group("connected") != null) {
                seen.unix.add(row.group("inode"));
            }
        }
        return isRow;
    }

    /** The address and port as people write them, 10.0.0.7:41234 or [2001:db8::7]:41234, whatever the source. */
    private String nameOf(String peer) throws IOException {
        int colon = peer.lastIndexOf(':');
        String address = peer.substring(0, colon);
        String port = peer.substring(colon + 1);
        if (source == Source.procfs) { // in words of 32 bits, see Documentation/networking/proc_net_tcp.rst of Linux
            ByteBuffer bytes = ByteBuffer.allocate(address.length() / 2).order(ByteOrder.nativeOrder());
            for (int i = 0; i < address.length(); i += 8) {
                bytes.putInt(Integer.parseUnsignedInt(address, i, i + 8, 16));
            }
            address = InetAddress.getByAddress(bytes.array()).getHostAddress()
                    .replaceFirst("(^|:)0(:0)+(:|$)", "::");
            port = String.valueOf(Integer.parseInt(port, 16));
        }
        address = address.replaceAll("^\\[?::ffff:(?=.*\\.)|[\\[\\]]", "");
        return (address.contains(":") ? "[" + address + "]" : address) + ":" + port;
    }
}

// ---- The log -------------------------------------------------------------------------------------------------------

/**
 * Writes lines where they can be seen. Writing to a pipe that nobody reads never ends, so a thread of its own does it:
 * up to 100 lines wait for it, and those that cannot be written are lost.
 */
record Log(Format format, String prefix, boolean toPid1, ExecutorService writer) {
    enum Format { json, text }

    private static final Pattern SPECIAL = Pattern.compile("[\"\\\\\\x00-\\x1F]");
    private static final Path STDERR_OF_PID_1 = Path.of("/proc/1/fd/2");

    Log(Format format, String prefix, boolean toPid1) {
        this(format, prefix, toPid1, new ThreadPoolExecutor(1, 1, 0, TimeUnit.SECONDS, new ArrayBlockingQueue<>(100),
                new ThreadPoolExecutor.DiscardPolicy()));
    }

    void add(String level, String message) {
        String text = prefix.isEmpty() ? message : prefix + " " + message;
        Instant now = Instant.ofEpochSecond(System.currentTimeMillis() / 1000);
        String line = format == Format.text ? text.replaceAll("\\p{Cntrl}", " ") : "{\"message\": \"" + escaped(text)
                + "\", \"timestamp\": \"" + now + "\", \"level\": \"" + level + "\"}";
        try {
            writer.execute(() -> write((line + "\n").getBytes(StandardCharsets.UTF_8)));
        } catch (OutOfMemoryError e) {
            // there can be no thread for it: without its log the hook still waits
        }
    }

    private static String escaped(String text) {
        return SPECIAL.matcher(text).replaceAll(special -> String.format("\\\\u%04x", (int) special.group().charAt(0)));
    }

    /** Waits until all is written, at most 1 s. */
    void close() throws InterruptedException {
        writer.shutdown();
        writer.awaitTermination(1, TimeUnit.SECONDS);
    }

    private void write(byte[] line) {
        if (toPid1) {
            try (OutputStream out = new FileOutputStream(STDERR_OF_PID_1.toFile(), true)) {
                // With shareProcessNamespace PID 1 is "pause", and what it gets is seen nowhere.
                if (!Files.readSymbolicLink(STDERR_OF_PID_1).endsWith("null")) {
                    out.write(line);
                    return;
                }
            } catch (IOException e) {
                // it belongs to another user, or is no file: the hook's own stderr is left
            }
        }
        System.err.write(line, 0, line.length); // where that fails there is no other place
    }
}
