//JAVA 17+
//JAVA_OPTIONS -XX:+UseSerialGC -XX:TieredStopAtLevel=1
//DEPS org.junit.platform:junit-platform-console-standalone:6.1.3
//DEPS com.fasterxml.jackson.core:jackson-databind:2.20.1
//SOURCES Hook.java
//SOURCES Tools.java

import java.io.*;
import java.net.*;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.util.*;
import java.util.stream.Stream;

/**
 * Measures what the hook costs, beside the shell pipeline that it replaces. Start it from the repository's root, as
 * test/bench does. What it cannot measure, or not in time, it leaves out, and says so in its last line.
 *
 * <p>A check is a line "Active connections to buildkitd" in the hook's debug log, so the figures include what writing
 * that line costs. The connections are real ones over loopback, of a process that netstat calls buildkitd.
 *
 * <ul>
 * <li>First look: from just before the start until that line is there, asked every 5 ms, with the settings' defaults.
 * <li>CPU per check: user and system time of a process and of those that it started. In each round the warm hook
 *     checks again and again for a while and is stopped, then a shell runs the pipeline for a while, and then the bare
 *     tool. So both ratios compare what ran side by side.
 * <li>Memory: the peak (VmHWM) of the hook's JVM when it is warm. All of them are warmed up at the same time.
 * </ul>
 */
class Bench {

    private static final long START = System.nanoTime();
    private static final String LOOKED = "Active connections to buildkitd";
    /** The hook gives up after this long, should this program be killed. */
    private static final int LONGEST_SECONDS = 300;
    private static final int BATCH_MS = 700;
    /** What the hook asks, each with the bare command that costs the same reading. */
    private static final Map<String, String> SOURCES = new LinkedHashMap<>();
    private static final Map<String, Path> JDKS = Tools.jdks();
    private static final String OWN_JDK = System.getProperty("java.version");
    /** The peaks, by row of the table. */
    private static final Map<String, List<String>> PEAKS = new LinkedHashMap<>();
    private static final Set<String> LEFT_OUT = new LinkedHashSet<>();
    /** Nobody listens on it. A hook that watches it asks all at every check, as at both ends of a quiet time. */
    private static final String NO_SOCKET = "/nobody.sock";
    /** The hook to the pipeline, by row of the table. */
    private static final Map<String, Double> RATIOS = new HashMap<>();
    private static Path directory;
    /** The two ends of the connections. One process may not open enough files for both. */
    private static Hook buildkitd;
    private static Hook clients;
    private static int port;
    private static int partEnds;

    private interface Step {
        void run() throws Exception;
    }

    /** With a port it is the clients, with 0 the server. */
    public static void main(String... args) throws IOException {
        if (args.length > 0) {
            beEnds(Integer.parseInt(args[0]));
            return;
        }
        Runtime.getRuntime().addShutdownHook(new Thread(
                () -> ProcessHandle.current().descendants().forEach(ProcessHandle::destroyForcibly)));
        // After these seconds each part begins nothing new, so that all is over after 6 minutes on a busy machine.
        part(30, "the machine", Bench::prepare);
        part(60, "the first look", Bench::firstLooks);
        print("%n%-44s%8s%10s%7s%16s%7s%7s", "CPU per check, ms, medians", "hook", "pipeline", "ratio", "(min to max)",
                "bare", "ratio");
        part(130, "quiet", () -> steady(0, 300, 5));
        part(200, "1 connection", () -> steady(1, 300, 5));
        part(230, "200 connections", () -> steady(200, 300, 0));
        part(330, "10,000 connections", () -> steady(10_000, 50, 3));
        part(360, "the sidecar", Bench::sidecars);
        print("%nA quiet time has 21 checks, and a tool is asked in 2 of them. To 20 pipelines: netstat %.2f, ss %.2f",
                quietTime("netstat"), quietTime("ss"));
        print("%npipeline: %s", pipeline());
        print("bare: %s", String.join("; ", SOURCES.values()));
        print("%n%-44s%8s%8s%8s", "Peak memory (VmHWM), MiB", "netstat", "ss", "procfs");
        PEAKS.forEach((row, peaks) -> print("%-44s%s", row, String.join("", peaks)));
        print("%nLeft out: %s. Took %d s.", LEFT_OUT.isEmpty() ? "nothing" : String.join("; ", LEFT_OUT), seconds());
        Hook.run(List.of("rm", "-r", directory.toString()), Map.of()).exitCode();
    }

    // ---- What is measured ------------------------------------------------------------------------------------------

    private static void prepare() throws IOException {
        directory = Files.createTempDirectory("buildkit-prestop-bench");
        for (String tool : List.of("netstat", "ss")) {
            step(tool, () -> {
                Tools.only(directory.resolve(tool), Map.of(tool, Tools.require(tool)));
                SOURCES.put(tool, tool + " -tanx");
            });
        }
        Tools.only(directory.resolve("procfs"), Map.of());
        SOURCES.put("procfs", "cat /proc/net/tcp /proc/net/tcp6 /proc/net/unix");
        buildkitd = startEnds(Files.createSymbolicLink(directory.resolve("buildkitd"), java(OWN_JDK)));
        port = Integer.parseInt(buildkitd.out().get(0));
        clients = startEnds(java(OWN_JDK));
        print("%d cores, load %s, %d processes, Linux %s, JDK %s, %s buckets in the kernel's table of TCP",
                Runtime.getRuntime().availableProcessors(), firstLine("/proc/loadavg").split(" ")[0],
                ProcessHandle.allProcesses().count(), System.getProperty("os.version"), OWN_JDK,
                firstLine("/proc/sys/net/ipv4/tcp_ehash_entries"));
        print("JVM options: %s", String.join(" ", Hook.directive("JAVA_OPTIONS")));
    }

    private static void firstLooks() {
        print("%n%-44s%8s%8s%8s", "From exec to the first look, s", "min", "median", "max");
        firstLook("jar", 11, Hook.javaCommand());
        firstLook("JBang, warm cache", 7, List.of("test/jbang", "run", Hook.SCRIPT.toString()));
    }

    private static void firstLook(String name, int runs, List<String> command) {
        List<Double> seconds = new ArrayList<>();
        for (int i = 0; i < runs; i++) {
            step(name, () -> {
                try (Hook hook = Hook.run(command, settings())) {
                    awaitLooks(hook, 1);
                    seconds.add(hook.age().toNanos() / 1e9);
                }
            });
        }
        print("%-44s%8.2f%8.2f%8.2f", name + ", " + seconds.size() + " runs", at(seconds, 0), at(seconds, 0.5),
                at(seconds, 1));
    }

    /** Measures hooks with so many connections: first those of this JDK and then, their memory only, the others. */
    private static void steady(int connections, int checks, int rounds) throws IOException {
        connect(connections);
        String with = connections == 0 ? "quiet" : String.format(Locale.ROOT, "%,d busy", connections);
        for (String jdk : JDKS.keySet()) {
            Map<String, Hook> hooks = new LinkedHashMap<>();
            // The hook asks the tool that it finds, and procfs if that sees nobody or there is none.
            SOURCES.keySet().forEach(source -> {
                Map<String, String> env = settings("PATH", directory.resolve(source), "CHECK_FREQUENCY_MS", 1,
                        "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", LONGEST_SECONDS);
                if (connections == 0 && !source.equals("procfs")) { env.put("BUILDKITD_SOCKET", NO_SOCKET); }
                hooks.put(source, Hook.run(command(jdk), env));
            });
            hooks.forEach((source, hook) -> step(with + ", JDK " + jdk + ", " + source, () -> {
                awaitLooks(hook, checks);
                peak(with + ", JDK " + jdk, hook);
                signal(hook, "STOP");
            }));
            hooks.forEach((source, hook) -> {
                if (rounds > 0 && jdk.equals(OWN_JDK)) {
                    String also = connections > 0 || source.equals("procfs") ? "" : ", then procfs";
                    step("CPU per check, " + with + ", " + source,
                            () -> compare(with + ": " + source + also, source, hook, rounds));
                }
                hook.close();
            });
        }
    }

    private static void compare(String name, String source, Hook hook, int rounds) throws IOException {
        List<Double> hooks = new ArrayList<>();
        List<Double> pipelines = new ArrayList<>();
        List<Double> bares = new ArrayList<>();
        List<Double> toPipeline = new ArrayList<>();
        List<Double> toBare = new ArrayList<>();
        for (int i = 0; i < rounds; i++) {
            hooks.add(msPerCheck(hook));
            pipelines.add(msPerRun(pipeline()));
            bares.add(msPerRun(SOURCES.get(source)));
            toPipeline.add(hooks.get(i) / pipelines.get(i));
            toBare.add(hooks.get(i) / bares.get(i));
        }
        RATIOS.put(name, at(toPipeline, 0.5));
        print("%-44s%8.2f%10.2f%7.2f%16s%7.2f%7.2f", name, at(hooks, 0.5), at(pipelines, 0.5), at(toPipeline, 0.5),
                String.format(Locale.ROOT, "(%.2f to %.2f)", at(toPipeline, 0), at(toPipeline, 1)), at(bares, 0.5),
                at(toBare, 0.5));
    }

    private static double quietTime(String tool) {
        return (2 * RATIOS.getOrDefault("quiet: " + tool + ", then procfs", Double.NaN)
                + 19 * RATIOS.getOrDefault("quiet: procfs", Double.NaN)) / 20;
    }

    /** What people ran before there was this hook. */
    private static String pipeline() {
        return "netstat -tnp 2>/dev/null | grep buildkitd | grep :" + port + " | grep -c ESTABLISHED";
    }

    /** One that nobody has asked yet, and after a busy drain. */
    private static void sidecars() throws IOException {
        for (String jdk : JDKS.keySet()) {
            connect(1);
            Path fifo = directory.resolve("fifo");
            List<String> command = command(jdk);
            command.addAll(List.of("--sidecar", fifo.toString()));
            step("sidecar, JDK " + jdk, () -> {
                try (Hook sidecar = Hook.run(command, settings("CHECK_FREQUENCY_MS", 1,
                        "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 0))) {
                    sidecar.awaitLog("Ready");
                    peak("sidecar idle, JDK " + jdk, sidecar);
                    Hook reader = Hook.run(List.of("sh", "-c", "read quiet <" + fifo), Map.of());
                    awaitLooks(sidecar, 300);
                    connect(0);
                    reader.exitCode();
                    peak("sidecar after a drain, JDK " + jdk, sidecar);
                }
                Files.deleteIfExists(fifo);
            });
        }
    }

    // ---- How it is measured ----------------------------------------------------------------------------------------

    private static Hook startEnds(Path java) {
        Hook ends = Hook.run(List.of(java.toString(), "-cp", System.getProperty("java.class.path"), "Bench", "" + port),
                Map.of());
        Hook.waitUntil("the other process answers", () -> ends.out().size() == 1);
        return ends;
    }

    /** The other processes: each has as many ends of connections as the latest line of its input says. */
    private static void beEnds(int port) throws IOException {
        InetAddress address = InetAddress.getLoopbackAddress();
        Deque<Socket> open = new ArrayDeque<>();
        try (ServerSocket server = new ServerSocket(0, 300, address);
                BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.US_ASCII))) {
            print("%d", server.getLocalPort());
            for (String line; (line = in.readLine()) != null; print("%s", line)) {
                int ends = Integer.parseInt(line);
                while (open.size() < ends) {
                    open.push(port == 0 ? server.accept() : new Socket(address, port));
                }
                while (open.size() > ends) {
                    open.peek().setSoLinger(true, 0); // its end is a reset, which leaves nothing in the kernel's table
                    open.pop().close();
                }
            }
        }
    }

    private static void connect(int connections) throws IOException {
        int answers = clients.out().size() + 1;
        for (Hook ends : List.of(clients, buildkitd)) {
            ends.process().getOutputStream().write((connections + "\n").getBytes(StandardCharsets.US_ASCII));
            ends.process().getOutputStream().flush();
        }
        Hook.waitUntil("there are " + connections + " connections",
                () -> clients.out().size() == answers && buildkitd.out().size() == answers);
    }

    private static Path java(String jdk) { return JDKS.get(jdk).resolve("bin/java"); }

    private static List<String> command(String jdk) {
        List<String> command = new ArrayList<>(Hook.javaCommand());
        command.set(0, java(jdk).toString());
        return command;
    }

    private static Map<String, String> settings(Object... more) {
        Map<String, String> env = Hook.env("BUILDKITD_PORT", port, "DEBUG", 1, "MAX_WAIT_SECONDS", LONGEST_SECONDS,
                "HOME", Tools.HOME, "JBANG_DIR", Tools.JBANG_DIR, "JAVA_HOME", System.getProperty("java.home"));
        env.putAll(Hook.env(more));
        return env;
    }

    private static void awaitLooks(Hook hook, int count) {
        while (looks(hook) < count) {
            if (!hook.process().isAlive()) {
                throw new IllegalStateException("it ended: " + hook.err().stream().findFirst().orElse(""));
            }
            if (seconds() >= partEnds) {
                throw new IllegalStateException("no time left after " + looks(hook) + " checks");
            }
            Hook.pause(5);
        }
        // A tool that a stop fell into has no answer in time, and is not asked again: what follows would be no measure.
        if (hook.messages("info").stream().anyMatch(line -> line.contains("Could not use"))) {
            throw new IllegalStateException("a stop fell into its tool");
        }
        List<String> seen = hook.checks();
        List<String> warnings = hook.messages("warning");
        if (seen.get(seen.size() - 1).equals("unknown")
                && !warnings.get(warnings.size() - 1).contains("nothing listens on " + NO_SOCKET)) {
            throw new IllegalStateException("it could not look: " + warnings);
        }
    }

    private static int looks(Hook hook) {
        return (int) hook.err().stream().filter(line -> line.contains(LOOKED)).count();
    }

    /** The CPU time of the hook's checks, which is stopped before and after. */
    private static double msPerCheck(Hook hook) throws IOException {
        String stat = "/proc/" + hook.process().pid() + "/stat";
        signal(hook, "CONT");
        awaitLooks(hook, looks(hook) + 3); // the check that the stop fell into is none to measure
        int before = looks(hook);
        double ms = -cpuMs(firstLine(stat));
        Hook.pause(BATCH_MS);
        awaitLooks(hook, looks(hook) + 1); // up to the end of a check
        int checks = looks(hook) - before;
        ms += cpuMs(firstLine(stat));
        signal(hook, "STOP");
        return ms / checks;
    }

    /** The CPU time of a shell that runs the command again and again until it is told to stop. */
    private static double msPerRun(String command) {
        try (Hook shell = Hook.run(List.of("sh", "-c", "trap last=1 TERM; i=0; while [ -z \"$last\" ]; do " + command
                + " >/dev/null; i=$((i+1)); done; echo $i; cat /proc/$$/stat"), Map.of())) {
            Hook.pause(BATCH_MS);
            shell.process().toHandle().destroy(); // which, unlike that of Process, leaves its output open
            shell.exitCode();
            return cpuMs(shell.out().get(1)) / Integer.parseInt(shell.out().get(0));
        }
    }

    /** From utime to cstime of /proc/PID/stat, see proc(5); a tick is 10 ms. */
    private static double cpuMs(String stat) {
        return Stream.of(stat.substring(stat.lastIndexOf(')') + 2).split(" "))
                .limit(15).skip(11).mapToLong(Long::parseLong).sum() * 10;
    }

    private static void peak(String row, Hook hook) throws IOException {
        try (Stream<String> lines = Files.lines(Path.of("/proc/" + hook.process().pid() + "/status"))) {
            String kb = lines.filter(line -> line.startsWith("VmHWM:")).findFirst().orElse("0").replaceAll("\\D", "");
            PEAKS.computeIfAbsent(row, name -> new ArrayList<>())
                    .add(String.format(Locale.ROOT, "%8.1f", Long.parseLong(kb) / 1024.0));
        }
    }

    private static String firstLine(String file) throws IOException {
        try (BufferedReader in = Files.newBufferedReader(Path.of(file), StandardCharsets.ISO_8859_1)) {
            return in.readLine();
        }
    }

    private static void signal(Hook hook, String name) {
        Hook.run(List.of("sh", "-c", "kill -" + name + " " + hook.process().pid()), Map.of()).exitCode();
    }

    // ---- Time, what is left out, and the table ---------------------------------------------------------------------

    private static void part(int untilSecond, String name, Step part) {
        partEnds = untilSecond;
        step(name, part);
    }

    /** Does it, if there is time. An error fails nothing but this step. */
    private static void step(String name, Step step) {
        try {
            if (seconds() >= partEnds) {
                throw new IllegalStateException("no time left");
            }
            step.run();
        } catch (Exception | AssertionError e) {
            LEFT_OUT.add(name + " (" + e.getMessage() + ")");
        }
    }

    private static long seconds() { return (System.nanoTime() - START) / 1_000_000_000; }

    /** The value at this part of the way from the least to the greatest. */
    private static double at(List<Double> values, double part) {
        return values.isEmpty() ? Double.NaN : values.stream().sorted().toList()
                .get((int) Math.round(part * (values.size() - 1)));
    }

    private static void print(String format, Object... values) {
        System.out.println(String.format(Locale.ROOT, format, values));
    }
}
