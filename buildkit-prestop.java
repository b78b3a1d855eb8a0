///usr/bin/env true; exec jbang "$0" "$@"
//JAVA 17+
//DEPS info.picocli:picocli:4.7.7
//JAVAC_OPTIONS -XDstringConcat=inline
//JAVA_OPTIONS -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:CompileThresholdScaling=100 -XX:-UsePerfData
//JAVA_OPTIONS -Xmx32m -Xmn1m --limit-modules=java.base

// buildkit-prestop: a Kubernetes preStop hook that waits for BuildKit's clients before it lets the pod stop.
//
// BuildKit does not wait for running builds when it gets SIGTERM (https://github.com/moby/buildkit/issues/4090).
// Kubernetes sends SIGTERM only when the preStop hook has ended, so this hook ends when the builds have.
//
// A client is connected to buildkitd's TCP port for as long as it builds. The hook counts these connections again
// and again, and exits 0 once there was none in so many checks in a row that the quiet time is over. It asks netstat,
// ss or procfs, whichever works. "Could not look" is never "no connection": then the hook goes on waiting.
//
// It cannot see builds that do not come over this port: buildx's kubernetes driver, kube-pod:// addresses and
// clients of the unix socket.
//
// The options above keep the JVM small, as it runs beside the builds: the serial collector with 1 MB for new objects,
// the quick compiler alone and only for the busiest loops, no module but java.base, strings joined without generated
// classes, and no file in /tmp, which may be read-only. The heap needs 2 MB; 32 are for an environment of megabytes.

import java.io.*;
import java.net.InetAddress;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.text.ParseException;
import java.time.Instant;
import java.time.temporal.ChronoUnit;
import java.util.*;
import java.util.concurrent.ArrayBlockingQueue;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.Callable;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.locks.ReentrantLock;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Stream;
import picocli.CommandLine;
import picocli.CommandLine.*;
import picocli.CommandLine.Model.ArgSpec;
import picocli.CommandLine.Model.OptionSpec;

@Command(name = "buildkit-prestop", version = "buildkit-prestop 1.0.0", mixinStandardHelpOptions = true,
        sortOptions = false, showDefaultValues = true,
        description = "Waits until no client has been connected to buildkitd for a while.",
        exitCodeListHeading = "%nExit codes:%n",
        exitCodeList = {"0:quiet long enough (--once: could look)",
            "1:gave up at MAX_WAIT_SECONDS (--once: could not look)",
            "2:bad command line"},
        footer = {"", "A flag wins over the environment. A bad flag ends the command. A bad value",
            "in the environment is logged, and the default is used."})
class BuildkitPrestop implements Callable<Integer> {

    // The descriptionKey of an option is the environment variable behind it.

    @Option(names = "--port", descriptionKey = "BUILDKITD_PORT", defaultValue = "1234", converter = Port.class,
            paramLabel = "PORT",
            description = "port that buildkitd listens on, 1 to 65535 (BUILDKITD_PORT)")
    private int port;

    @Option(names = "--check-frequency-ms", descriptionKey = "CHECK_FREQUENCY_MS", defaultValue = "500",
            converter = AtLeastOne.class, paramLabel = "MS",
            description = "time between two checks, at least 1 (CHECK_FREQUENCY_MS)")
    private int checkFrequencyMs;

    @Option(names = "--quiet-seconds", descriptionKey = "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS",
            defaultValue = "10", converter = AtLeastZero.class, paramLabel = "S",
            description = "how long it must stay quiet, at least 0"
                    + " (WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS)")
    private int quietSeconds;

    @Option(names = "--max-wait-seconds", descriptionKey = "MAX_WAIT_SECONDS", defaultValue = "0",
            converter = AtLeastZero.class, paramLabel = "S",
            description = "give up after this long, so that buildkitd still gets its SIGTERM inside"
                    + " terminationGracePeriodSeconds; 0: no limit (MAX_WAIT_SECONDS)")
    private int maxWaitSeconds;

    @Option(names = "--source", descriptionKey = "CONNECTION_SOURCE", defaultValue = "auto", paramLabel = "NAME",
            description = "auto, or only netstat, ss or procfs (CONNECTION_SOURCE)")
    private Source source;

    @Option(names = "--log-format", descriptionKey = "LOG_FORMAT", defaultValue = "json", paramLabel = "NAME",
            description = "json or text (LOG_FORMAT)")
    private LogFormat logFormat;

    @Option(names = "--log-prefix", descriptionKey = "LOG_PREFIX", defaultValue = "[PreStop Hook]",
            paramLabel = "TEXT",
            description = "put before each message; empty: no prefix (LOG_PREFIX)")
    private String logPrefix;

    @Option(names = "--debug", description = "log every check (DEBUG: any value that is not empty)")
    private boolean debug;

    @Option(names = "--once", description = "look once, print the number of active connections, exit")
    private boolean once;

    private static final byte[] END = new byte[0];
    private static final Map<String, String> ENVIRONMENT = environment();
    private static final ReentrantLock STARTING = new ReentrantLock();
    private static final File TCP = new File("/proc/net/tcp");
    private static final File TCP6 = new File("/proc/net/tcp6");
    private static final long REPORT_EVERY_MS = TimeUnit.MINUTES.toMillis(1);
    private static final long TOOL_TIMEOUT_NANOS = TimeUnit.SECONDS.toNanos(5);

    private final List<String> badEnvironment = new ArrayList<>();
    private final List<Source> sources = new ArrayList<>(List.of(Source.netstat, Source.ss, Source.procfs));
    private String netstatOptions = "-tanW"; // W: long IPv6 addresses whole; not every BusyBox knows it
    private final Map<Source, String> failures = new EnumMap<>(Source.class);
    private final Set<Source> warned = EnumSet.noneOf(Source.class);
    private final BlockingQueue<byte[]> unwritten = new ArrayBlockingQueue<>(100);
    private final Thread writer = new Thread(this::writeAll);
    private boolean portChecked;
    private String reportedCount;
    private long reportedMs;

    public static void main(String... args) {
        // A tool that hangs when SIGTERM arrives must not outlive the hook, and none may be started after it.
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            STARTING.lock();
            kill(ProcessHandle.current().descendants());
        }));
        BuildkitPrestop hook = new BuildkitPrestop();
        System.exit(new CommandLine(hook)
                .setDefaultValueProvider(hook::fromEnvironment)
                .setParameterExceptionHandler((badFlag, rest) -> {
                    badFlag.getCommandLine().getErr().println(badFlag.getMessage() + " (see --help)");
                    return 2;
                })
                .execute(asUtf8(args)));
    }

    @Override
    public Integer call() throws InterruptedException {
        startWriter();
        debug |= !ENVIRONMENT.getOrDefault("DEBUG", "").isEmpty();
        for (String message : badEnvironment) {
            log("warning", message);
        }
        if (source != Source.auto) {
            sources.retainAll(List.of(source));
        }
        int exitCode = once ? printCount() : waitUntilQuiet();
        unwritten.offer(END);
        writer.join(1000);
        return exitCode;
    }

    private int printCount() {
        Connections seen = look();
        warn(seen);
        if (seen == null) {
            log("warning", describe(null) + ".");
            return 1;
        }
        System.out.println(seen.count);
        return 0;
    }

    private int waitUntilQuiet() throws InterruptedException {
        log("info", "Waiting for build processes to finish...");
        long checksNeeded = Math.max(1, (quietSeconds * 1000L + checkFrequencyMs - 1) / checkFrequencyMs);
        long quietChecks = 0;
        long start = System.nanoTime();
        while (true) {
            Connections seen = look();
            long waitedMs = TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - start);
            report(seen, waitedMs);
            quietChecks = seen != null && seen.count == 0 ? quietChecks + 1 : 0;
            if (quietChecks >= checksNeeded) {
                log("info", "All build processes seem to have stopped. Exiting now.");
                return 0;
            }
            long leftMs = maxWaitSeconds == 0 ? Long.MAX_VALUE : maxWaitSeconds * 1000L - waitedMs;
            if (leftMs <= 0) {
                log("warning", "Giving up after MAX_WAIT_SECONDS, " + maxWaitSeconds + " s: " + describe(seen) + ".");
                return 1;
            }
            Thread.sleep(Math.min(checkFrequencyMs, leftMs));
        }
    }

    /** Logs each change, and a sign of life every minute. */
    private void report(Connections seen, long waitedMs) {
        warn(seen);
        String count = seen == null ? "unknown" : String.valueOf(seen.count);
        if (debug) {
            log("debug", "Active connections to buildkitd: " + count);
        }
        boolean nextCheckIsTooLate = waitedMs + checkFrequencyMs > reportedMs + REPORT_EVERY_MS;
        if (!count.equals(reportedCount) || nextCheckIsTooLate) {
            log(seen == null ? "warning" : "info", describe(seen) + ". Waited " + waitedMs / 1000 + " s so far.");
            reportedCount = count;
            reportedMs = waitedMs;
        }
    }

    /** Logs what may be wrong although something was seen: a source that failed, and at the start the port. */
    private void warn(Connections seen) {
        if (seen == null) {
            return;
        }
        for (Source source : failures.keySet()) {
            if (warned.add(source)) {
                log("warning", "Could not use " + failures.get(source) + ".");
            }
        }
        if (!seen.listening && !portChecked) {
            log("warning", "Nothing listens on port " + port + ". Is BUILDKITD_PORT right?");
        }
        portChecked = true;
    }

    private String describe(Connections seen) {
        if (seen == null) {
            return "Cannot tell whether clients are connected to port " + port + ": "
                    + String.join("; ", failures.values());
        }
        int unnamed = seen.count - seen.peers.size();
        return seen.count + (seen.count == 1 ? " connection" : " connections") + " to port " + port
                + (seen.count == 0 ? "" : " from " + String.join(", ", seen.peers))
                + (unnamed == 0 ? "" : " and " + unnamed + " more");
    }

    // ---- Looking ---------------------------------------------------------------------------------------------------

    /** What one look has seen of buildkitd's port. */
    static final class Connections {
        private static final int PEERS_NAMED = 5;

        int count;
        boolean listening;
        final Set<String> peers = new LinkedHashSet<>();
        private final long[] recent = new long[1024];

        /**
         * Counts a connection; row is a hash of its two ends. When a table grows while it is read, the kernel shows its
         * last rows once more. They follow close behind, so it is enough to know the latest.
         */
        void add(long row) {
            int slot = (int) (row & (recent.length - 1));
            if (count == 0 || recent[slot] != row) { // the first one counts, whatever its hash
                recent[slot] = row;
                count++;
            }
        }
    }

    /** Asks the sources in turn, those that failed before last. Null when none of them could tell. */
    private Connections look() {
        Map<Source, String> missing = new EnumMap<>(Source.class);
        failures.clear();
        Connections seen = null;
        for (Source source : List.copyOf(sources)) {
            try {
                seen = look(source);
                if (seen.count > 0 || seen.listening) {
                    break;
                }
                // Neither a connection nor a listener: that is what a wrong port shows, but also a tool that sees
                // nothing at all. So the others are asked too.
            } catch (NoSuchFileException e) {
                missing.put(source, e.getMessage());
            } catch (Throwable e) { // out of memory, threads or file descriptors: whatever it is, it is not quiet
                failures.put(source, source + ": " + Objects.requireNonNullElse(e.getMessage(), e.toString()));
                sources.remove(source);
                sources.add(source);
            }
        }
        if (seen == null) {
            failures.putAll(missing);
        }
        return seen;
    }

    private Connections look(Source source) throws Exception {
        if (source == Source.ss) {
            return run(Format.SS, "ss", "-tan", "sport", "=", ":" + port);
        }
        boolean noIpv6 = Files.notExists(TCP6.toPath()); // false where it cannot be told
        if (source == Source.netstat) {
            if (!TCP.canRead() || !noIpv6 && !TCP6.canRead()) { // BusyBox would show an empty table
                throw new IOException("no access to " + TCP + " and " + TCP6);
            }
            try {
                return run(Format.NETSTAT, "netstat", netstatOptions);
            } catch (ParseException e) {
                if (!e.getMessage().contains("option")) {
                    throw e;
                }
                netstatOptions = "-tan";
                return run(Format.NETSTAT, "netstat", netstatOptions);
            }
        }
        Connections seen = new Connections();
        for (File table : noIpv6 ? List.of(TCP) : List.of(TCP, TCP6)) {
            try (InputStream in = new FileInputStream(table)) {
                Format.PROCFS.parse(in::read, port, seen);
            }
        }
        return seen;
    }

    private Connections run(Format format, String... command) throws Exception {
        command[0] = onPath(command[0]);
        ProcessBuilder builder = new ProcessBuilder(command).redirectErrorStream(true);
        builder.environment().put("LC_ALL", "C"); // net-tools translates its output
        Process process;
        STARTING.lock();
        try {
            process = builder.start();
        } finally {
            STARTING.unlock();
        }
        try {
            Connections seen = new Connections();
            format.parse(outputOf(process), port, seen);
            if (process.exitValue() != 0) {
                throw new IOException("exit status " + process.exitValue());
            }
            return seen;
        } finally {
            if (process.isAlive()) {
                kill(Stream.concat(Stream.of(process.toHandle()), process.descendants()));
            }
        }
    }

    private static String onPath(String tool) throws NoSuchFileException {
        for (String directory : ENVIRONMENT.getOrDefault("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").split(":")) {
            File file = new File(directory, tool);
            if (file.canExecute() && !file.isDirectory()) {
                return file.getPath();
            }
        }
        throw new NoSuchFileException(tool + " is not on the PATH");
    }

    /**
     * What the process prints, until it exits; an IOException after 5 s. It never blocks, not even on a pipe that
     * a child of the process holds open.
     */
    private static Chunks outputOf(Process process) {
        InputStream out = process.getInputStream();
        long start = System.nanoTime();
        return (buffer, offset, length) -> {
            while (System.nanoTime() - start < TOOL_TIMEOUT_NANOS) {
                boolean exited = !process.isAlive(); // asked before the pipe: then an empty pipe stays empty
                int ready = out.available();
                if (ready > 0) {
                    return out.read(buffer, offset, Math.min(length, ready));
                }
                if (exited) {
                    return -1;
                }
                Thread.sleep(2); // not waitFor: the lock it takes would stay in the JVM, 200 bytes per check
            }
            throw new IOException("no answer in 5 s");
        };
    }

    private static void kill(Stream<ProcessHandle> processes) {
        processes.forEach(ProcessHandle::destroyForcibly);
    }

    /** Bytes as InputStream.read(byte[], int, int) gives them. */
    interface Chunks {
        int read(byte[] buffer, int offset, int length) throws Exception;
    }

    /**
     * How each source writes its table, see netstat(8), ss(8) and Documentation/networking/proc_net_tcp.rst of Linux:
     * a heading, then nothing but rows. Columns are counted from 0.
     */
    record Format(Pattern heading, int local, int peer, int state, String established, String listen, int radix) {
        static final Format NETSTAT = new Format(Pattern.compile(
                "Active Internet connections|(?<columns>Proto +Recv-Q +Send-Q +Local Address +Foreign Address )"),
                3, 4, 5, "ESTABLISHED", "LISTEN", 10);
        static final Format SS = new Format(Pattern.compile(
                "(?<columns>State +Recv-Q +Send-Q +Local Address:Port +Peer Address:Port)"),
                3, 4, 0, "ESTAB", "LISTEN", 10);
        static final Format PROCFS = new Format(Pattern.compile(
                "(?<columns> *sl +local_address +rem(ote)?_address +st )"),
                1, 2, 3, "01", "0A", 16);
        private static final int LONGEST_LINE = 4096;
        private static final int COLUMNS = 6;

        /**
         * Adds to seen what the table tells of the local port.
         *
         * @throws ParseException if it is not a whole table
         */
        void parse(Chunks in, int port, Connections seen) throws Exception {
            byte[] buffer = new byte[LONGEST_LINE];
            int filled = 0;
            boolean inRows = false;
            for (int n; (n = in.read(buffer, filled, buffer.length - filled)) > 0; ) {
                filled += n;
                int done = 0;
                for (int end; !inRows && (end = endOfLine(buffer, done, filled)) < filled; done = end + 1) {
                    inRows = parseHeading(text(buffer, done, end));
                }
                if (inRows) {
                    done = addRows(buffer, done, filled, port, seen);
                }
                filled -= done;
                System.arraycopy(buffer, done, buffer, 0, filled);
            }
            if (!inRows || filled > 0) {
                throw notATable("the end came too early");
            }
        }

        /** Whether the rows come next. */
        private boolean parseHeading(String line) throws ParseException {
            Matcher fields = heading.matcher(line);
            if (!fields.lookingAt()) {
                throw notATable(line);
            }
            return fields.group("columns") != null;
        }

        /** Adds the rows from start on, and returns where the first one begins that is not whole yet. */
        private int addRows(byte[] buffer, int start, int filled, int port, Connections seen) throws Exception {
            int[] from = new int[COLUMNS];
            int[] to = new int[COLUMNS];
            while (true) {
                findColumns(buffer, start, filled, from, to);
                int end = endOfLine(buffer, to[COLUMNS - 1], filled);
                if (end == filled) {
                    return start;
                }
                if (!addRow(buffer, from, to, port, seen)) {
                    throw notATable(text(buffer, start, end));
                }
                start = end + 1;
            }
        }

        /** Where the words of the line at start begin and end; a column that it does not have is empty. */
        private static void findColumns(byte[] buffer, int start, int filled, int[] from, int[] to) {
            int i = start;
            for (int column = 0; column < COLUMNS; column++) {
                while (i < filled && buffer[i] == ' ') {
                    i++;
                }
                from[column] = i;
                while (i < filled && buffer[i] != ' ' && buffer[i] != '\n') {
                    i++;
                }
                to[column] = i;
            }
        }

        /** False if it is no row. Works on the bytes: at every check there may be 10,000 rows, most of no interest. */
        private boolean addRow(byte[] buffer, int[] from, int[] to, int port, Connections seen) throws IOException {
            int localPort = port(buffer, from[local], to[local]);
            int peerPort = port(buffer, from[peer], to[peer]);
            if (localPort < 0 || peerPort < 0 || from[state] == to[state]) {
                return false;
            }
            if (localPort != port) {
                return true;
            }
            String stateWord = text(buffer, from[state], to[state]);
            seen.listening |= stateWord.equals(listen);
            if (stateWord.equals(established)) {
                long hash = 0;
                for (int i = from[local]; i < to[peer]; i++) {
                    hash = hash * 1_000_003 + buffer[i];
                }
                seen.add(hash);
                if (seen.peers.size() < Connections.PEERS_NAMED) {
                    seen.peers.add(name(text(buffer, from[peer], to[peer])) + ":" + peerPort);
                }
            }
            return true;
        }

        /** Where the next line feed is; filled, if there is none. */
        private static int endOfLine(byte[] buffer, int from, int filled) {
            while (from < filled && buffer[from] != '\n') {
                from++;
            }
            return from;
        }

        /** The port behind the last colon, 0 where it is written as a star; less than 0 if there is none. */
        private int port(byte[] buffer, int from, int to) {
            int start = to;
            while (start > from && buffer[start - 1] != ':') {
                start--;
            }
            if (start == from || start == to) {
                return -1;
            }
            if (start == to - 1 && buffer[start] == '*') {
                return 0;
            }
            int port = 0;
            for (int i = start; i < to; i++) {
                int digit = Character.digit(buffer[i], radix);
                if (digit < 0 || port > 0xFFFF) {
                    return -1;
                }
                port = port * radix + digit;
            }
            return port;
        }

        /** The address as people write it, 10.0.0.7 or [2001:db8::7], whatever way the source writes it. */
        private String name(String end) throws IOException {
            String address = end.substring(0, end.lastIndexOf(':'));
            if (this == PROCFS) {
                ByteBuffer bytes = ByteBuffer.allocate(address.length() / 2).order(ByteOrder.nativeOrder());
                for (int i = 0; i < address.length(); i += 8) {
                    bytes.putInt(Integer.parseUnsignedInt(address, i, i + 8, 16));
                }
                address = InetAddress.getByAddress(bytes.array()).getHostAddress();
                for (int zeros = 8; zeros > 1 && !address.contains("::"); zeros--) {
                    address = address.replaceFirst("(^|:)0(:0){" + (zeros - 1) + "}(:|$)", "::");
                }
            }
            address = address.replaceAll("[\\[\\]]", "").replaceFirst("^::ffff:(?=.*\\.)", "");
            return address.contains(":") ? "[" + address + "]" : address;
        }

        private static String text(byte[] buffer, int from, int to) {
            return new String(buffer, from, to - from, StandardCharsets.ISO_8859_1);
        }

        private static ParseException notATable(String found) {
            return new ParseException("not a socket table: " + found.substring(0, Math.min(found.length(), 100)), 0);
        }
    }

    // ---- Settings --------------------------------------------------------------------------------------------------

    enum Source { auto, netstat, ss, procfs }

    enum LogFormat { json, text }

    static final class Port extends WholeNumber { Port() { super(1, 65535); } }

    static final class AtLeastOne extends WholeNumber { AtLeastOne() { super(1, Integer.MAX_VALUE); } }

    static final class AtLeastZero extends WholeNumber { AtLeastZero() { super(0, Integer.MAX_VALUE); } }

    abstract static class WholeNumber implements ITypeConverter<Integer> {
        private final int least;
        private final int most;

        WholeNumber(int least, int most) {
            this.least = least;
            this.most = most;
        }

        @Override
        public Integer convert(String value) {
            try {
                int number = Integer.parseInt(value.strip());
                if (number >= least && number <= most) {
                    return number;
                }
            } catch (NumberFormatException e) {
                // as bad as a number out of range
            }
            throw new TypeConversionException("'" + value + "' is not a whole number from " + least + " to " + most);
        }
    }

    /** The option's value in the environment. Null, where it is unset or bad, makes picocli use the default. */
    private String fromEnvironment(ArgSpec option) {
        String value = ENVIRONMENT.get(option.descriptionKey());
        if (value == null) {
            return null;
        }
        try {
            if (option.type() != String.class) { // any text is good; for the others it is what the flag allows
                new CommandLine(new BuildkitPrestop()).parseArgs(((OptionSpec) option).longestName() + "=" + value);
            }
            return value.replace("$", "$$"); // picocli would replace ${...}
        } catch (ParameterException e) {
            badEnvironment.add("Ignoring " + option.descriptionKey() + ", using " + option.defaultValue() + ". "
                    + e.getMessage() + ".");
            return null;
        }
    }

    private static Map<String, String> environment() {
        Map<String, String> environment = new HashMap<>(System.getenv());
        for (String entry : utf8("environ")) {
            String[] parts = entry.split("=", 2);
            environment.put(parts[0], parts[parts.length - 1]);
        }
        return environment;
    }

    private static String[] asUtf8(String[] args) {
        String[] commandLine = utf8("cmdline");
        int first = commandLine.length - 1 - args.length;
        for (int i = 0; i < args.length; i++) {
            if (args[i].contains("\uFFFD") && first + i > 0) {
                args[i] = commandLine[first + i];
            }
        }
        return args;
    }

    /**
     * The NUL-terminated strings of /proc/self/environ or cmdline, see proc(5), then an empty one. Where the locale
     * is C, as in most containers, the JVM's own copies have lost every character that is not ASCII.
     */
    private static String[] utf8(String file) {
        try (InputStream in = new FileInputStream("/proc/self/" + file)) {
            return new String(in.readAllBytes(), StandardCharsets.UTF_8).split("\0", -1);
        } catch (IOException e) {
            return new String[0];
        }
    }

    // ---- The log ---------------------------------------------------------------------------------------------------

    /** Logs one line. One that cannot be written is lost, and the wait goes on. */
    private void log(String level, String message) {
        String text = logPrefix.isEmpty() ? message : logPrefix + " " + message;
        String line = logFormat == LogFormat.text ? text.replaceAll("\\p{Cntrl}", " ")
                : "{\"message\": \"" + escaped(text) + "\", \"timestamp\": \""
                        + Instant.now().truncatedTo(ChronoUnit.SECONDS) + "\", \"level\": \"" + level + "\"}";
        byte[] bytes = (line + "\n").getBytes(StandardCharsets.UTF_8);
        if (writer.isAlive()) {
            unwritten.offer(bytes);
        } else {
            write(bytes);
        }
    }

    /** Writing to a pipe that nobody reads never ends. So a thread of its own does it. */
    private void startWriter() {
        writer.setDaemon(true);
        try {
            writer.start();
        } catch (OutOfMemoryError e) {
            // no more threads: each line is written at once
        }
    }

    private void writeAll() {
        try {
            for (byte[] line = unwritten.take(); line != END; line = unwritten.take()) {
                write(line);
            }
        } catch (InterruptedException e) {
            // nobody interrupts it
        }
    }

    /** Writes where it can be seen. */
    private void write(byte[] line) {
        // Nobody sees a hook's own stderr; what PID 1 writes there is what kubectl logs shows. --once has a terminal.
        if (ENVIRONMENT.containsKey("KUBERNETES_SERVICE_HOST") && !once) {
            try (FileOutputStream pid1 = new FileOutputStream("/proc/1/fd/2", true)) {
                pid1.write(line);
                return;
            } catch (IOException e) {
                // it belongs to another user, or is no file: stderr is left
            }
        }
        System.err.write(line, 0, line.length); // where that fails there is no other place
    }

    private static String escaped(String text) {
        StringBuilder json = new StringBuilder();
        for (char c : text.toCharArray()) {
            if (c < ' ') {
                json.append(String.format("\\u%04x", (int) c));
            } else {
                json.append(c == '"' || c == '\\' ? "\\" : "").append(c);
            }
        }
        return json.toString();
    }
}
