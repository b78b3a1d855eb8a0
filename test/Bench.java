//JAVA 17+
//JAVA_OPTIONS -XX:+UseSerialGC -XX:TieredStopAtLevel=1
//DEPS org.junit.platform:junit-platform-console-standalone:6.1.3
//DEPS com.fasterxml.jackson.core:jackson-databind:2.20.1
//SOURCES Hook.java
//SOURCES Tools.java

import static java.util.stream.Collectors.joining;

import java.io.BufferedReader;
import java.io.IOException;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;
import java.util.stream.Stream;

/**
 * Measures what the hook costs, beside the bare tools. Start it from the repository's root, as test/bench does. What
 * it cannot measure, or not in time, it leaves out, and says so in its last line.
 *
 * <p>A check is a line "Active connections to buildkitd" in the hook's debug log, so the figures include what writing
 * that line costs. The connections are real ones over loopback.
 *
 * <ul>
 * <li>First look: from just before the start until that line is there, asked every 5 ms, with the settings' defaults.
 * <li>CPU per check: user and system time of the hook and of the tools that it started, over a batch of checks of a
 *     hook that is warm, 1 ms apart. After each batch the hook is stopped (SIGSTOP), and a shell runs the bare tool as
 *     often, its output to /dev/null. One hook batch and one bare batch make a pair, and a ratio; minimum, median and
 *     maximum are those of the pairs.
 * <li>Memory: the peak (VmHWM) of the hook's JVM when it is warm. All of them are warmed up at the same time.
 * <li>Growth: VmRSS of one hook after so many checks, 1 ms apart.
 * </ul>
 */
class Bench {

    private static final long START = System.nanoTime();
    private static final String LOOKED = "Active connections to buildkitd";
    /** The hook gives up after this long, should this program be killed. */
    private static final int LONGEST_SECONDS = 200;
    private static final int PAIRS = 5;
    private static final int BATCH_MS = 1500;

    private static final List<String> SOURCES = new ArrayList<>();
    private static final Map<String, Path> JDKS = Tools.jdks();
    private static final String OWN_JDK = System.getProperty("java.version");
    /** The peaks, by row of the table and then by source. */
    private static final Map<String, Map<String, String>> PEAKS = new LinkedHashMap<>();
    private static final Set<String> LEFT_OUT = new LinkedHashSet<>();
    /** The server's ends of the connections. */
    private static final List<Socket> OPEN = new ArrayList<>();
    private static int partEnds;

    private interface Step {
        void run() throws Exception;
    }

    /** With two arguments it is the other process, that of the clients. */
    public static void main(String... args) throws IOException {
        if (args.length == 2) {
            beClients(Integer.parseInt(args[0]), Integer.parseInt(args[1]));
            return;
        }
        Runtime.getRuntime().addShutdownHook(new Thread(
                () -> ProcessHandle.current().descendants().forEach(ProcessHandle::destroyForcibly)));
        try (ServerSocket server = new ServerSocket(0, 300, InetAddress.getLoopbackAddress())) {
            // After these seconds each part begins nothing new, so that all is over after 4 minutes on a busy machine.
            part(30, "the machine", Bench::machine);
            part(30, "the first look", () -> firstLooks(server.getLocalPort()));
            part(85, "1 connection", () -> steady(server, 1, 300, true));
            part(95, "200 connections", () -> steady(server, 200, 300, false));
            part(170, "10,000 connections", () -> steady(server, 10_000, 100, true));
            part(230, "growth", () -> growth(server.getLocalPort()));
        }
        part(240, "memory", Bench::memory);
        print("");
        print("Left out: " + (LEFT_OUT.isEmpty() ? "nothing" : String.join("; ", LEFT_OUT)) + ". Took "
                + (System.nanoTime() - START) / 1_000_000_000 + " s.");
    }

    // ---- What is measured ------------------------------------------------------------------------------------------

    private static void machine() throws IOException {
        for (String tool : List.of("netstat", "ss")) {
            step(tool, () -> SOURCES.add(Tools.require(tool).getFileName().toString()));
        }
        SOURCES.add("procfs");
        print(Runtime.getRuntime().availableProcessors() + " cores, Linux " + System.getProperty("os.version")
                + ", JDK " + OWN_JDK + ", " + firstLine("/proc/sys/net/ipv4/tcp_ehash_entries")
                + " buckets in the kernel's table of TCP");
        print("JVM options: " + String.join(" ", Hook.directive("JAVA_OPTIONS")));
    }

    private static void firstLooks(int port) {
        title("From exec to the first look, s", "all");
        firstLook("jar", 11, Hook.javaCommand(), port);
        firstLook("JBang, warm cache", 7, List.of("test/jbang", "run", Hook.SCRIPT.toString()), port);
    }

    private static void firstLook(String name, int runs, List<String> command, int port) {
        List<Double> seconds = new ArrayList<>();
        for (int i = 0; i < runs; i++) {
            step(name, () -> {
                try (Hook hook = Hook.run(command, settings(port))) {
                    awaitLooks(hook, 1);
                    seconds.add(hook.age().toNanos() / 1e9);
                }
            });
        }
        row(name + ", " + seconds.size() + " runs", seconds);
    }

    /** Measures the hooks with so many connections, first those of this JDK and then, their memory only, the others. */
    private static void steady(ServerSocket server, int connections, int checks, boolean compare) throws IOException {
        connect(server, connections);
        String with = String.format(Locale.ROOT, "%,d connection%s", connections, connections == 1 ? "" : "s");
        if (compare) {
            title("CPU per check, ms, with " + with, "hook", "bare tool", "ratio");
        }
        for (String jdk : JDKS.keySet()) {
            Map<String, Hook> hooks = new LinkedHashMap<>();
            Map<String, String> peaks = new HashMap<>();
            SOURCES.forEach(source -> hooks.put(source, start(jdk, source, server.getLocalPort())));
            hooks.forEach((source, hook) -> step(with + ", JDK " + jdk + ", " + source, () -> {
                awaitLooks(hook, checks);
                peaks.put(source, mib(hook, "VmHWM"));
                signal(hook, "STOP");
            }));
            hooks.forEach((source, hook) -> {
                if (compare && jdk.equals(OWN_JDK) && peaks.containsKey(source)) {
                    step("CPU per check, " + with + ", " + source, () -> compare(source, hook));
                }
                hook.close();
            });
            PEAKS.put(with + ", JDK " + jdk, peaks);
        }
    }

    private static void compare(String source, Hook hook) throws IOException {
        String tool = switch (source) {
            case "netstat" -> "netstat -tanx";
            case "ss" -> "ss -tanx";
            default -> "cat /proc/net/tcp /proc/net/tcp6 /proc/net/unix";
        };
        String stat = "/proc/" + hook.process().pid() + "/stat";
        List<Double> hooks = new ArrayList<>();
        List<Double> bare = new ArrayList<>();
        List<Double> ratios = new ArrayList<>();
        try {
            while (ratios.size() < PAIRS) {
                signal(hook, "CONT");
                awaitLooks(hook, looks(hook) + 3); // the check that the stop fell into is none to measure
                int before = looks(hook);
                double ticks = -ticks(firstLine(stat), 11);
                Hook.pause(BATCH_MS);
                awaitLooks(hook, looks(hook) + 1); // up to the end of a check
                int checks = looks(hook) - before;
                ticks += ticks(firstLine(stat), 11);
                signal(hook, "STOP");
                double bareTicks = bareTicks(tool, checks);
                hooks.add(ticks * 10 / checks); // a tick is 10 ms
                bare.add(bareTicks * 10 / checks);
                ratios.add(ticks / bareTicks);
            }
        } finally {
            row(source + " | " + tool.replace("/proc/net/", ""), hooks, bare, ratios);
        }
    }

    private static void growth(int port) throws IOException {
        for (Socket socket : OPEN.subList(1, OPEN.size())) {
            socket.close();
        }
        String source = SOURCES.contains("ss") ? "ss" : "procfs";
        StringBuilder line = new StringBuilder("VmRSS, MiB, " + source + ", 1 connection, after this many checks:");
        try (Hook hook = start(OWN_JDK, source, port)) {
            for (int checks : List.of(100, 1000, 3000, 10_000)) {
                awaitLooks(hook, checks);
                line.append(String.format(Locale.ROOT, "  %,d: %s", checks, mib(hook, "VmRSS")));
            }
        } finally {
            print("");
            print(line.toString());
        }
    }

    private static void memory() {
        print("");
        cells("Peak memory (VmHWM) of the warm hook, MiB", SOURCES);
        PEAKS.forEach((row, peaks) -> cells(row,
                SOURCES.stream().map(source -> peaks.getOrDefault(source, "-")).toList()));
    }

    // ---- How it is measured ----------------------------------------------------------------------------------------

    /** Opens connections until there are so many. One process may not open enough files for both their ends. */
    private static void connect(ServerSocket server, int count) throws IOException {
        Hook.run(List.of(JDKS.get(OWN_JDK).resolve("bin/java").toString(), "-cp", System.getProperty("java.class.path"),
                "Bench", "" + server.getLocalPort(), "" + (count - OPEN.size())), Map.of());
        server.setSoTimeout(10_000);
        while (OPEN.size() < count) {
            Socket accepted = server.accept();
            accepted.setSoLinger(true, 0); // its end is a reset, which leaves nothing in the kernel's table
            OPEN.add(accepted);
        }
    }

    private static void beClients(int port, int count) throws IOException {
        List<Socket> open = new ArrayList<>();
        for (int i = 0; i < count; i++) {
            open.add(new Socket(InetAddress.getLoopbackAddress(), port));
        }
        System.in.read(); // it ends with the process that started this one
    }

    private static Map<String, String> settings(int port, Object... more) {
        Map<String, String> env = Hook.env(more);
        env.putAll(Hook.env("BUILDKITD_PORT", port, "DEBUG", 1, "MAX_WAIT_SECONDS", LONGEST_SECONDS, "HOME",
                Tools.HOME, "JBANG_DIR", Tools.JBANG_DIR, "JAVA_HOME", System.getProperty("java.home")));
        return env;
    }

    private static Hook start(String jdk, String source, int port) {
        List<String> command = new ArrayList<>(Hook.javaCommand());
        command.set(0, JDKS.get(jdk).resolve("bin/java").toString());
        return Hook.run(command, settings(port, "CONNECTION_SOURCE", source, "CHECK_FREQUENCY_MS", 1));
    }

    private static void awaitLooks(Hook hook, int count) {
        while (looks(hook) < count) {
            if (!hook.process().isAlive()) {
                throw new IllegalStateException("it ended: " + hook.err().stream().findFirst().orElse(""));
            }
            if (secondsLeft() <= 0) {
                throw new IllegalStateException("no time left after " + looks(hook) + " checks");
            }
            Hook.pause(5);
        }
        List<String> seen = hook.checks();
        if (seen.get(seen.size() - 1).equals("unknown")) { // the one that a stop fell into may be: it took too long
            throw new IllegalStateException("it could not look: " + hook.messages("warning"));
        }
    }

    private static int looks(Hook hook) {
        return (int) hook.err().stream().filter(line -> line.contains(LOOKED)).count();
    }

    /** The CPU time of the bare tool, run so often. */
    private static double bareTicks(String tool, int times) {
        try (Hook shell = Hook.run(List.of("sh", "-c", "i=0; while [ $i -lt " + times + " ]; do " + tool
                + " >/dev/null; i=$((i+1)); done; cat /proc/$$/stat"), Map.of())) {
            shell.exitCode();
            return ticks(shell.out().get(0), 13); // not that of the shell itself
        }
    }

    /** The sum of the fields from the first one to cstime of /proc/PID/stat, counted from the state, see proc(5). */
    private static double ticks(String stat, int first) {
        return Stream.of(stat.substring(stat.lastIndexOf(')') + 2).split(" "))
                .limit(15).skip(first).mapToLong(Long::parseLong).sum();
    }

    /** A figure in kB of /proc/PID/status, in MiB. */
    private static String mib(Hook hook, String name) throws IOException {
        try (Stream<String> lines = Files.lines(Path.of("/proc/" + hook.process().pid() + "/status"))) {
            return lines.filter(line -> line.startsWith(name + ":")).map(line -> line.replaceAll("\\D", ""))
                    .map(kb -> String.format(Locale.ROOT, "%.1f", Long.parseLong(kb) / 1024.0)).findFirst().orElse("-");
        }
    }

    private static String firstLine(String file) throws IOException {
        try (BufferedReader in = Files.newBufferedReader(Path.of(file), StandardCharsets.ISO_8859_1)) {
            return in.readLine();
        }
    }

    private static void signal(Hook hook, String name) {
        try (Hook kill = Hook.run(List.of("sh", "-c", "kill -" + name + " " + hook.process().pid()), Map.of())) {
            kill.exitCode();
        }
    }

    // ---- Time, and what is left out --------------------------------------------------------------------------------

    private static void part(int untilSecond, String name, Step part) {
        partEnds = untilSecond;
        step(name, part);
    }

    /** Does it, if there is time. An error fails nothing but this step. */
    private static void step(String name, Step step) {
        try {
            if (secondsLeft() <= 0) {
                throw new IllegalStateException("no time left");
            }
            step.run();
        } catch (Exception | AssertionError e) {
            LEFT_OUT.add(name + " (" + e.getMessage() + ")");
        }
    }

    private static long secondsLeft() {
        return partEnds - (System.nanoTime() - START) / 1_000_000_000;
    }

    // ---- The table -------------------------------------------------------------------------------------------------

    /** The heading of columns for the minimum, median and maximum of each group. */
    private static void title(String name, String... groups) {
        print("");
        if (groups.length > 1) {
            print(" ".repeat(44) + Stream.of(groups).map(group -> String.format("%24s", group)).collect(joining()));
        }
        cells(name, Stream.of(groups).flatMap(group -> Stream.of("min", "median", "max")).toList());
    }

    @SafeVarargs
    private static void row(String name, List<Double>... groups) {
        cells(name, Stream.of(groups).flatMap(group -> {
            List<Double> sorted = group.stream().sorted().toList();
            int n = sorted.size();
            return n == 0 ? Stream.of("-", "-", "-") : Stream.of(sorted.get(0),
                    (sorted.get((n - 1) / 2) + sorted.get(n / 2)) / 2, sorted.get(n - 1))
                    .map(value -> String.format(Locale.ROOT, "%.2f", value));
        }).toList());
    }

    private static void cells(String name, List<String> cells) {
        print(String.format("%-44s", name) + cells.stream().map(cell -> String.format("%8s", cell)).collect(joining()));
    }

    private static void print(String line) {
        System.out.println(line);
    }
}
