//JAVA 17+
//JAVA_OPTIONS -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Xmx64m

import java.io.BufferedReader;
import java.io.FileInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.UncheckedIOException;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.TimeUnit;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Stream;

/**
 * Measures what the hook costs, beside the bare tools. Start it from the repository's root, as test/bench does.
 *
 * <p>The hook is the script's class as JBang has compiled it, run by java with the script's own JVM options; "JBang"
 * is test/jbang with the script. A check is a line "Active connections to buildkitd" in its debug log, so the figures
 * include what writing that line costs. Connections are real ones over loopback. Two processes hold their ends, neither
 * of them the one that starts what is measured: open files make a start dearer.
 *
 * <ul>
 * <li>First look: from just before the process is started until that line is read the first time, with the sources'
 *     usual order. JBang's own part ends when the process, whose id stays the same, has become the hook's JVM (seen in
 *     /proc/PID/cmdline, asked every 2 ms). A CPU limit is a cgroup that the process enters before it becomes the hook.
 * <li>JVMs: processes whose executable is java, all over the machine, that carry a variable which only this start of
 *     the hook was given, while the hook waits.
 * <li>CPU per check: utime + stime + cutime + cstime of /proc/PID/stat, which holds the tools that the hook started,
 *     over a batch of checks of a hook that is warm, 1 ms apart. After each batch the hook is stopped (SIGSTOP), and a
 *     shell runs the bare tool as often, its output to /dev/null; that shell's cutime + cstime counts. One hook batch
 *     and one bare batch make a pair, and a ratio; minimum, median and maximum are those of the pairs.
 * <li>Memory: VmHWM, RssAnon and, where smaps_rollup can be read, Pss of the hook's JVM when it is warm. Pss shares the
 *     JDK's files with the other JVMs that run meanwhile; alone in a container the hook pays for them itself.
 * <li>Growth: VmRSS of one hook after so many checks, 1 ms apart. It runs while the starts under a CPU limit do, which
 *     leave most of a core idle.
 * </ul>
 */
class Bench {

    private static final long START = System.nanoTime();
    /** The seconds after which each part begins nothing new, so that all is over after 3 minutes on a busy machine. */
    private static final int LOOKS_UNTIL = 35;
    private static final int ONE_UNTIL = 80;
    private static final int MANY_UNTIL = 125;
    private static final int LIMITS_UNTIL = 165;
    private static final int MANY = 10_000;
    /** Checks until a hook counts as warm; with MANY connections each check warms it more, and takes longer. */
    private static final int WARM = 300;
    private static final int WARM_MANY = 100;
    private static final int LEAST_WARM = 20;
    private static final int PAIRS = 5;
    private static final double BATCH_SECONDS = 0.6;
    /** What the pairs of a connection count need of its part's time. */
    private static final int PAIRS_SECONDS = 22;
    private static final String LOOKED = "Active connections to buildkitd";
    private static final String MARK = "BUILDKIT_PRESTOP_BENCH";
    private static final Path SCRIPT = Path.of("buildkit-prestop.java");
    private static final List<String> SOURCES = List.of("ss", "netstat", "procfs");

    private static final List<Running> STARTED = new ArrayList<>();
    private static final List<Path> CGROUPS = new ArrayList<>();
    private static final List<String> LEFT_OUT = new ArrayList<>();
    private static boolean ending;
    private static volatile int partUntil;

    public static void main(String... args) throws Exception {
        if (args.length > 0) { // one of the two processes that hold the ends of the connections
            if (args[0].equals("serve")) {
                serve();
            } else {
                connect(Integer.parseInt(args[1]), Integer.parseInt(args[2]));
            }
            return;
        }
        Runtime.getRuntime().addShutdownHook(new Thread(Bench::endAll));
        try {
            measure();
        } finally {
            endAll();
        }
        print("");
        print("Left out: " + (LEFT_OUT.isEmpty() ? "nothing" : String.join("; ", LEFT_OUT)) + ". Took "
                + (System.nanoTime() - START) / 1_000_000_000 + " s.");
    }

    private static void measure() throws Exception {
        Map<String, Path> jdks = jdks();
        printMachine(jdks);
        String classpath = classpath();
        try (Running server = holder("serve")) {
            int port = Integer.parseInt(server.awaitLine("port ", 30).substring("port ".length()));
            try (Running one = holder("connect", String.valueOf(port), "1")) {
                one.awaitLine("connected", 30);
                partUntil = LOOKS_UNTIL;
                firstLooks(classpath, port);
                Map<String, List<String>> memory = new TreeMap<>();
                title("CPU per check, ms", "hook", "bare tool", "ratio");
                partUntil = ONE_UNTIL;
                steady(jdks, classpath, port, 1, memory);
                partUntil = MANY_UNTIL;
                try (Running many = holder("connect", String.valueOf(port), String.valueOf(MANY - 1))) {
                    many.awaitLine("connected", 30);
                    steady(jdks, classpath, port, MANY, memory);
                } catch (TimeoutOrEnd e) {
                    leaveOut(count(MANY) + " connections: " + e.getMessage());
                }
                print("");
                print(String.format("%-44s%10s%10s%10s", "Memory of the warm hook, MiB", "VmHWM", "RssAnon",
                        "Pss"));
                memory.values().forEach(rows -> rows.forEach(Bench::print));
                partUntil = LIMITS_UNTIL;
                growthAndLimits(classpath, port);
            }
        }
    }

    // ---- First look ------------------------------------------------------------------------------------------------

    private static void firstLooks(String classpath, int port) throws Exception {
        title("From exec to the first look, s");
        List<String> java = javaCommand(Path.of(System.getProperty("java.home")), classpath);
        jarRow("jar", java, List.of(), port, 11);
        jbangRows("JBang, warm cache", List.of(), port, 7);
    }

    private static void jarRow(String name, List<String> java, List<String> wrapper, int port, int runs)
            throws Exception {
        List<Double> seconds = new ArrayList<>();
        for (int i = 0; i < runs && canBegin(name); i++) {
            try (Running hook = hook(join(wrapper, java), port, Map.of("CHECK_FREQUENCY_MS", "500"))) {
                seconds.add(hook.awaitLooks(1, patience()));
            } catch (TimeoutOrEnd e) {
                leaveOut(name + ": " + e.getMessage());
                break;
            }
        }
        row(name + runs(seconds), 2, seconds);
    }

    private static void jbangRows(String name, List<String> wrapper, int port, int runs) throws Exception {
        List<String> command = join(wrapper, List.of("test/jbang", "run", SCRIPT.toString()));
        List<Double> seconds = new ArrayList<>();
        List<Double> before = new ArrayList<>();
        List<Double> after = new ArrayList<>();
        List<Double> jvms = new ArrayList<>();
        for (int i = 0; i < runs && canBegin(name); i++) {
            String mark = System.nanoTime() + "-" + i;
            try (Running hook = hook(command, port, Map.of("CHECK_FREQUENCY_MS", "500", MARK, mark))) {
                double jbang = hook.awaitCommand("BuildkitPrestop", patience());
                double all = hook.awaitLooks(1, patience());
                seconds.add(all);
                before.add(jbang);
                after.add(all - jbang);
                jvms.add((double) jvms(mark));
            } catch (TimeoutOrEnd e) {
                leaveOut(name + ": " + e.getMessage());
                break;
            }
        }
        row(name + runs(seconds), 2, seconds);
        row("  of it JBang, until the hook's JVM starts", 2, before);
        row("  of it the hook", 2, after);
        row("  JVMs while the hook waits", 0, jvms);
    }

    private static long jvms(String mark) throws IOException {
        try (Stream<Path> entries = Files.list(Path.of("/proc"))) {
            return entries.filter(entry -> entry.getFileName().toString().matches("[0-9]+")).filter(entry -> {
                try {
                    return Files.readSymbolicLink(entry.resolve("exe")).endsWith("java")
                            && text(entry.resolve("environ")).contains(MARK + "=" + mark);
                } catch (IOException e) { // another user's, or gone
                    return false;
                }
            }).count();
        }
    }

    // ---- Steady state ----------------------------------------------------------------------------------------------

    /** Warms all hooks up at the same time, reads their memory, and then measures those of this JDK one by one. */
    private static void steady(Map<String, Path> jdks, String classpath, int port, int connections,
            Map<String, List<String>> memory) throws Exception {
        Path own = Path.of(System.getProperty("java.home")).toRealPath();
        Map<String, Running> toMeasure = new LinkedHashMap<>();
        Map<String, Running> warming = new LinkedHashMap<>();
        if (!canBegin(count(connections) + " connections")) {
            return;
        }
        for (String source : SOURCES) {
            if (source.equals("procfs") || onPath(source)) {
                for (Map.Entry<String, Path> jdk : jdks.entrySet()) {
                    Running hook = hook(javaCommand(jdk.getValue(), classpath), port, steadySettings(source));
                    warming.put("JDK " + jdk.getKey() + ", " + source + ", " + connections(connections), hook);
                    if (jdk.getValue().equals(own)) {
                        toMeasure.put(source, hook);
                    }
                }
            } else if (connections == 1) {
                leaveOut(source + " (not on the PATH)");
            }
        }
        for (Map.Entry<String, Running> entry : warming.entrySet()) {
            String name = entry.getKey();
            Running hook = entry.getValue();
            try {
                warm(name, hook, connections == 1 ? WARM : WARM_MANY);
                memory.computeIfAbsent(name.replaceFirst(", .*", ""), jdk -> new ArrayList<>())
                        .add(String.format("%-44s%10s%10s%10s", name, mib(hook, "status", "VmHWM"),
                                mib(hook, "status", "RssAnon"), mib(hook, "smaps_rollup", "Pss")));
                if (toMeasure.containsValue(hook)) {
                    hook.signal("STOP");
                } else {
                    hook.close();
                }
            } catch (TimeoutOrEnd e) {
                leaveOut(name + ": " + e.getMessage());
                hook.close();
                toMeasure.values().remove(hook);
            }
        }
        for (Map.Entry<String, Running> entry : toMeasure.entrySet()) {
            try (Running hook = entry.getValue()) {
                String name = entry.getKey() + ", " + connections(connections);
                if (canBegin("CPU per check, " + name)) {
                    pairs(name, hook, bare(entry.getKey()));
                }
            } catch (TimeoutOrEnd e) {
                leaveOut("CPU per check, " + entry.getKey() + ": " + e.getMessage());
            }
        }
    }

    private static void warm(String name, Running hook, int checks) throws InterruptedException, TimeoutOrEnd {
        try {
            hook.awaitLooks(checks, Math.max(0, secondsLeft() - PAIRS_SECONDS));
        } catch (TimeoutOrEnd e) {
            int looks = hook.looks();
            if (looks < LEAST_WARM || !hook.process.isAlive()) {
                throw e;
            }
            leaveOut(checks - looks + " of " + checks + " checks to warm up with " + name);
        }
    }

    private static void pairs(String name, Running hook, String bare) throws Exception {
        List<Double> hooks = new ArrayList<>();
        List<Double> tools = new ArrayList<>();
        List<Double> ratios = new ArrayList<>();
        int batch = 5; // the first pair only tells how many checks fit into a batch
        for (int i = 0; i <= PAIRS; i++) {
            if (i > 1 && secondsLeft() <= 0) {
                leaveOut(PAIRS + 1 - i + " of " + PAIRS + " pairs of " + name);
                break;
            }
            hook.signal("CONT");
            int first = hook.looks() + 3; // the check that the stop fell into is none to measure
            double begin = hook.awaitLooks(first, 30);
            long cpu = cpu(hook, true);
            double end = hook.awaitLooks(first + batch, 30);
            double hookMs = (cpu(hook, true) - cpu) * 10.0 / batch; // a tick is 10 ms
            hook.signal("STOP");
            double toolMs = bareTicks(bare, batch) * 10.0 / batch;
            if (i == 0) {
                batch = (int) Math.max(5, Math.min(150, BATCH_SECONDS * batch / (end - begin)));
                continue;
            }
            hooks.add(hookMs);
            tools.add(toolMs);
            ratios.add(hookMs / toolMs);
        }
        row(name + " | " + bare.replace("/proc/net/", ""), 2, hooks, tools, ratios);
    }

    private static String bare(String source) {
        return switch (source) {
            case "ss" -> "ss -tan";
            case "netstat" -> "netstat -tn";
            default -> "cat /proc/net/tcp" + (Files.exists(Path.of("/proc/net/tcp6")) ? " /proc/net/tcp6" : "");
        };
    }

    private static long bareTicks(String command, int times) throws Exception {
        try (Running shell = start(List.of("sh", "-c", "i=0; while [ $i -lt " + times + " ]; do " + command
                + " >/dev/null; i=$((i+1)); done; echo \"stat $(cat /proc/$$/stat)\""), Map.of())) {
            return ticks(shell.awaitLine("stat ", 30), false);
        }
    }

    private static long cpu(Running process, boolean withItself) throws IOException {
        return ticks(text(process.proc("stat")), withItself);
    }

    private static long ticks(String stat, boolean withItself) {
        String[] fields = stat.substring(stat.lastIndexOf(')') + 2).split(" "); // from the third on, see proc(5)
        long ticks = 0;
        for (int i = withItself ? 11 : 13; i <= 14; i++) {
            ticks += Long.parseLong(fields[i]);
        }
        return ticks;
    }

    private static Map<String, String> steadySettings(String source) {
        return Map.of("CONNECTION_SOURCE", source, "CHECK_FREQUENCY_MS", "1");
    }

    /** A figure in kB of a file such as /proc/PID/status, in MiB. */
    private static String mib(Running process, String file, String name) {
        try {
            Matcher kb = Pattern.compile("(?m)^" + name + ":\\s+([0-9]+) kB").matcher(text(process.proc(file)));
            return kb.find() ? String.format(Locale.ROOT, "%.1f", Long.parseLong(kb.group(1)) / 1024.0) : "-";
        } catch (IOException e) {
            return "-";
        }
    }

    // ---- Growth and CPU limits -------------------------------------------------------------------------------------

    private static void growthAndLimits(String classpath, int port) throws Exception {
        List<String> java = javaCommand(Path.of(System.getProperty("java.home")), classpath);
        String source = onPath("ss") ? "ss" : "procfs";
        if (!canBegin("growth and CPU limits")) {
            return;
        }
        Map<Integer, String> rss = new LinkedHashMap<>();
        try (Running hook = hook(java, port, steadySettings(source))) {
            Thread watcher = new Thread(() -> {
                try {
                    for (int checks : List.of(100, 300, 1000, 3000, 5000, 10_000)) {
                        hook.awaitLooks(checks, Math.max(0, secondsLeft()));
                        rss.put(checks, mib(hook, "status", "VmRSS"));
                    }
                } catch (TimeoutOrEnd | InterruptedException e) {
                    leaveOut("growth after more than " + count(hook.looks()) + " checks: " + e.getMessage());
                }
            });
            watcher.setDaemon(true);
            watcher.start();
            title("From exec to the first look, s");
            limited("CPU limit 500m", 500, java, port, 3, 3);
            limited("CPU limit 100m", 100, java, port, 3, 2);
            watcher.join(1000 * Math.max(1, secondsLeft() + 2));
        }
        print("");
        print("VmRSS, MiB, " + source + ", after this many checks: " + String.join(", ",
                rss.entrySet().stream().map(entry -> count(entry.getKey()) + ": " + entry.getValue()).toList()));
    }

    private static void limited(String name, int millicores, List<String> java, int port, int jarRuns, int jbangRuns)
            throws Exception {
        Path cgroup = cgroup(millicores);
        if (cgroup == null) {
            leaveOut(name + " (cannot make a cgroup: needs root and a writable cgroup file system)");
            return;
        }
        List<String> enter = List.of("sh", "-c", "echo $$ >\"$0\" && exec \"$@\"", cgroup + "/cgroup.procs");
        jarRow("jar, " + name, java, enter, port, jarRuns);
        jbangRows("JBang, " + name, enter, port, jbangRuns);
    }

    /** A new cgroup with that CPU limit; null where it cannot be made. */
    private static Path cgroup(int millicores) {
        long quota = millicores * 100L;
        for (String parent : List.of("/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup")) {
            Path cgroup = Path.of(parent, "buildkit-prestop-bench-" + ProcessHandle.current().pid() + "-" + millicores);
            boolean v2 = Files.exists(Path.of(parent, "cgroup.controllers"));
            if (!v2 && !Files.exists(Path.of(parent, "cpu.cfs_quota_us"))) {
                continue;
            }
            try {
                synchronized (STARTED) {
                    Files.createDirectory(cgroup);
                    CGROUPS.add(cgroup);
                }
                if (v2) {
                    if (!text(Path.of(parent, "cgroup.subtree_control")).contains("cpu ")) {
                        Files.writeString(Path.of(parent, "cgroup.subtree_control"), "+cpu");
                    }
                    Files.writeString(cgroup.resolve("cpu.max"), quota + " 100000");
                } else {
                    Files.writeString(cgroup.resolve("cpu.cfs_period_us"), "100000");
                    Files.writeString(cgroup.resolve("cpu.cfs_quota_us"), String.valueOf(quota));
                }
                return cgroup;
            } catch (IOException e) {
                // the next one, or none
            }
        }
        return null;
    }

    // ---- The machine -----------------------------------------------------------------------------------------------

    private static void printMachine(Map<String, Path> jdks) {
        String buckets = "an unknown number of";
        try {
            buckets = count(Integer.parseInt(text(Path.of("/proc/sys/net/ipv4/tcp_ehash_entries")).strip()));
        } catch (IOException | NumberFormatException e) {
            leaveOut("the number of buckets (no net.ipv4.tcp_ehash_entries)");
        }
        print(Runtime.getRuntime().availableProcessors() + " cores, Linux " + System.getProperty("os.version") + ", "
                + buckets + " buckets in the kernel's TCP table, JDK " + System.getProperty("java.version")
                + (jdks.size() > 1 ? " (memory: JDKs " + String.join(", ", jdks.keySet()) + ")" : ""));
        print("JVM options: " + String.join(" ", directive("JAVA_OPTIONS")));
    }

    /** The JDK that runs this, and those of the versions from 17 on that lie beside it, by version. */
    private static Map<String, Path> jdks() throws IOException {
        Path own = Path.of(System.getProperty("java.home")).toRealPath();
        Map<String, Path> jdks = new TreeMap<>();
        try (Stream<Path> siblings = Files.list(own.getParent())) {
            for (Path home : siblings.toList()) {
                try {
                    Matcher version = Pattern.compile("JAVA_VERSION=\"(([0-9]+)[^\"]*)\"")
                            .matcher(text(home.resolve("release")));
                    if (Files.isExecutable(home.resolve("bin/java")) && version.find()
                            && Integer.parseInt(version.group(2)) >= 17) {
                        jdks.putIfAbsent(version.group(1), home.toRealPath());
                    }
                } catch (IOException e) {
                    // no JDK
                }
            }
        }
        jdks.values().remove(own);
        jdks.put(System.getProperty("java.version"), own);
        return jdks;
    }

    // ---- Processes -------------------------------------------------------------------------------------------------

    private static String classpath() throws Exception {
        try (Running build = start(List.of("test/jbang", "build", SCRIPT.toString()), Map.of())) {
            build.awaitEnd(60);
        }
        try (Running info = start(List.of("test/jbang", "info", "classpath", SCRIPT.toString()), Map.of())) {
            return info.awaitLine("/", 60);
        }
    }

    private static List<String> javaCommand(Path jdk, String classpath) {
        return join(List.of(jdk.resolve("bin/java").toString()), directive("JAVA_OPTIONS"),
                List.of("-cp", classpath, "BuildkitPrestop"));
    }

    /** The words behind a directive in the script's header. */
    private static List<String> directive(String name) {
        try (Stream<String> lines = Files.lines(SCRIPT)) {
            return lines.filter(line -> line.startsWith("//" + name + " "))
                    .flatMap(line -> Stream.of(line.split(" ")).skip(1)).toList();
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    private static Running hook(List<String> command, int port, Map<String, String> settings) throws IOException {
        Map<String, String> env = new LinkedHashMap<>(settings);
        env.put("BUILDKITD_PORT", String.valueOf(port));
        env.put("DEBUG", "1");
        env.put("MAX_WAIT_SECONDS", "200"); // should this program be killed
        return start(command, env);
    }

    private static Running holder(String... args) throws IOException {
        return start(join(List.of(System.getProperty("java.home") + "/bin/java", "-XX:+UseSerialGC",
                "-XX:TieredStopAtLevel=1", "-Xmx64m", "-cp", System.getProperty("java.class.path"), "Bench"),
                List.of(args)), Map.of());
    }

    private static Running start(List<String> command, Map<String, String> settings) throws IOException {
        ProcessBuilder builder = new ProcessBuilder(command).redirectErrorStream(true);
        builder.environment().keySet().retainAll(List.of("PATH", "HOME", "TMPDIR", "JBANG_DIR", "JBANG_REPO",
                "JBANG_CACHE_DIR", "MAVEN_OPTS"));
        builder.environment().put("JAVA_HOME", System.getProperty("java.home"));
        builder.environment().putAll(settings);
        synchronized (STARTED) {
            if (ending) {
                throw new IOException("interrupted");
            }
            Running running = new Running(builder);
            STARTED.add(running);
            return running;
        }
    }

    private static void endAll() {
        synchronized (STARTED) {
            ending = true;
            STARTED.forEach(Running::close);
            for (Path cgroup : CGROUPS) {
                for (int i = 0; i < 100 && Files.exists(cgroup); i++) { // busy until the last process is gone
                    try {
                        Files.delete(cgroup);
                    } catch (IOException e) {
                        pause(20);
                    }
                }
            }
        }
    }

    /** A process that was started, and what it has printed. */
    private static final class Running implements AutoCloseable {
        private final long started = System.nanoTime();
        private final Process process;
        private final List<String> lines = new ArrayList<>();
        private final List<Double> looks = new ArrayList<>();
        private boolean closed;

        Running(ProcessBuilder builder) throws IOException {
            process = builder.start();
            Thread reader = new Thread(() -> {
                try (BufferedReader out = new BufferedReader(
                        new InputStreamReader(process.getInputStream(), StandardCharsets.UTF_8))) {
                    out.lines().forEach(this::add);
                } catch (IOException | UncheckedIOException e) {
                    // it was ended
                }
                synchronized (this) {
                    closed = true;
                    notifyAll();
                }
            });
            reader.setDaemon(true);
            reader.start();
        }

        private synchronized void add(String line) {
            if (line.contains(LOOKED)) {
                looks.add(age());
            } else if (lines.size() < 100) {
                lines.add(line);
            }
            notifyAll();
        }

        private double age() {
            return (System.nanoTime() - started) / 1e9;
        }

        Path proc(String file) {
            return Path.of("/proc", String.valueOf(process.pid()), file);
        }

        synchronized int looks() {
            return looks.size();
        }

        /** Waits for this many looks since the start; the seconds that they took. */
        synchronized double awaitLooks(int count, long seconds) throws InterruptedException, TimeoutOrEnd {
            for (double end = age() + seconds; looks.size() < count; ) {
                await(end);
            }
            return looks.get(count - 1);
        }

        synchronized String awaitLine(String start, long seconds) throws InterruptedException, TimeoutOrEnd {
            for (double end = age() + seconds; ; ) {
                for (String line : lines) {
                    if (line.startsWith(start)) {
                        return line;
                    }
                }
                await(end);
            }
        }

        private void await(double end) throws InterruptedException, TimeoutOrEnd {
            if (closed || age() >= end) {
                throw new TimeoutOrEnd((closed ? "it ended" : "it took too long")
                        + (lines.isEmpty() ? "" : ", its last line: " + lines.get(lines.size() - 1)));
            }
            wait(Math.max(1, (long) ((end - age()) * 1000)));
        }

        /** Waits until the process has become the command with this word; the seconds since the start. */
        double awaitCommand(String word, long seconds) throws TimeoutOrEnd {
            for (double end = age() + seconds; age() < end && process.isAlive(); ) {
                try {
                    if (Arrays.asList(text(proc("cmdline")).split("\0")).contains(word)) {
                        return age();
                    }
                } catch (IOException e) {
                    break; // gone
                }
                pause(2);
            }
            throw new TimeoutOrEnd("it did not become " + word);
        }

        void awaitEnd(long seconds) throws InterruptedException, TimeoutOrEnd {
            if (!process.waitFor(seconds, TimeUnit.SECONDS)) {
                throw new TimeoutOrEnd("it took too long");
            }
        }

        void signal(String name) throws Exception {
            try (Running kill = start(List.of("sh", "-c", "kill -" + name + " " + process.pid()), Map.of())) {
                kill.awaitEnd(10);
            }
        }

        @Override
        public void close() {
            List<ProcessHandle> children = process.descendants().toList();
            process.destroyForcibly();
            children.forEach(ProcessHandle::destroyForcibly);
            try {
                process.waitFor(10, TimeUnit.SECONDS);
            } catch (InterruptedException e) {
                Thread.currentThread().interrupt();
            }
            synchronized (STARTED) {
                if (!ending) {
                    STARTED.remove(this);
                }
            }
        }
    }

    private static final class TimeoutOrEnd extends Exception {
        TimeoutOrEnd(String message) {
            super(message);
        }
    }

    // ---- The connections' ends -------------------------------------------------------------------------------------

    /** Accepts every connection, and ends when stdin does, as it does with the process that started it. */
    private static void serve() throws IOException {
        ServerSocket listener = new ServerSocket(0, 300);
        List<Socket> open = new ArrayList<>();
        Thread acceptor = new Thread(() -> {
            try {
                while (true) {
                    open.add(listener.accept());
                }
            } catch (IOException e) {
                throw new UncheckedIOException(e);
            }
        });
        acceptor.setDaemon(true);
        acceptor.start();
        print("port " + listener.getLocalPort());
        untilStdinEnds();
    }

    private static void connect(int port, int count) throws IOException {
        List<Socket> open = new ArrayList<>();
        for (int i = 0; i < count; i++) {
            Socket socket = new Socket(InetAddress.getByName("127.0.0.1"), port);
            socket.setSoLinger(true, 0); // the end is a reset, which leaves nothing in the kernel's table
            open.add(socket);
        }
        print("connected");
        untilStdinEnds();
        open.clear();
    }

    private static void untilStdinEnds() throws IOException {
        while (System.in.read() >= 0) {
            // nothing is ever sent
        }
    }

    // ---- The table -------------------------------------------------------------------------------------------------

    private static void title(String name, String... groups) {
        print("");
        StringBuilder line = new StringBuilder(String.format("%-44s", groups.length == 0 ? name : ""));
        if (groups.length > 0) {
            for (String group : groups) {
                line.append(String.format("%24s", group));
            }
            print(line.toString());
            line = new StringBuilder(String.format("%-44s", name));
        }
        for (int i = 0; i < Math.max(1, groups.length); i++) {
            line.append(String.format("%8s%8s%8s", "min", "median", "max"));
        }
        print(line.toString());
    }

    @SafeVarargs
    private static void row(String name, int digits, List<Double>... groups) {
        StringBuilder line = new StringBuilder(String.format("%-44s", name));
        for (List<Double> group : groups) {
            List<Double> sorted = group.stream().sorted().toList();
            int n = sorted.size();
            for (Double value : n == 0 ? Arrays.asList(null, null, (Double) null)
                    : List.of(sorted.get(0), (sorted.get((n - 1) / 2) + sorted.get(n / 2)) / 2, sorted.get(n - 1))) {
                line.append(value == null ? String.format("%8s", "-")
                        : String.format(Locale.ROOT, "%8." + digits + "f", value));
            }
        }
        print(line.toString());
    }

    private static String runs(List<Double> seconds) {
        return " (" + seconds.size() + (seconds.size() == 1 ? " run)" : " runs)");
    }

    private static String connections(int number) {
        return count(number) + (number == 1 ? " connection" : " connections");
    }

    private static String count(int number) {
        return String.format(Locale.ROOT, "%,d", number);
    }

    private static synchronized void print(String line) {
        System.out.println(line);
    }

    // ---- Small things ----------------------------------------------------------------------------------------------

    private static boolean canBegin(String what) {
        if (secondsLeft() > 0) {
            return true;
        }
        leaveOut(what + " (no time left)");
        return false;
    }

    private static long secondsLeft() {
        return partUntil - (System.nanoTime() - START) / 1_000_000_000;
    }

    /** How long a start may take: a little longer than its part of the time. */
    private static long patience() {
        return Math.max(0, secondsLeft()) + 5;
    }

    private static void leaveOut(String what) {
        synchronized (LEFT_OUT) {
            if (!LEFT_OUT.contains(what)) {
                LEFT_OUT.add(what);
            }
        }
    }

    private static boolean onPath(String tool) {
        return Stream.of(System.getenv("PATH").split(":"))
                .anyMatch(directory -> Files.isExecutable(Path.of(directory, tool)));
    }

    @SafeVarargs
    private static List<String> join(List<String>... lists) {
        return Stream.of(lists).flatMap(List::stream).toList();
    }

    /** The whole of a file such as those of /proc, which have no size. */
    private static String text(Path file) throws IOException {
        try (InputStream in = new FileInputStream(file.toFile())) { // Files.readAllBytes gets one digit of a sysctl
            return new String(in.readAllBytes(), StandardCharsets.ISO_8859_1);
        }
    }

    private static void pause(long ms) {
        try {
            Thread.sleep(ms);
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        }
    }
}
