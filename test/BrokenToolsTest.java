import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.nio.file.attribute.PosixFilePermissions;
import java.time.Duration;
import java.util.*;
import java.util.function.Predicate;
import java.util.stream.Stream;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.*;

/** Whatever tools do, they can only make the hook stay. Where the kernel's tables cannot be read, it stays too. */
class BrokenToolsTest {

    private static final String PEER = "10.9.8.7:4711";
    private static final String SOCKET = "prestop-stub.sock";
    private static final String NO_ANSWER = "no answer in 5 s";

    @TempDir
    private Path directory;

    @AfterEach
    void endWhatStubsHaveStarted() throws IOException { Tools.end(pids().stream()); }

    // ---- Tools that fail -------------------------------------------------------------------------------------------

    /**
     * One way to fail: what the stub does, and why it is not asked again; null: it is. The port that it speaks of is
     * the watched one. No script: there is no such command.
     */
    record Fault(String name, String script, String reason) {
        @Override public String toString() { return name; }
    }

    static Stream<Fault> faults() {
        // All that these show is that nobody is connected.
        String table = print("tcp 0 0 0.0.0.0:PORT 0.0.0.0:* LISTEN")
                + print("tcp 0 0 10.0.0.1:PORT " + PEER + " TIME_WAIT")
                + print("tcp 0 0 10.0.0.1:9 " + PEER + " ESTABLISHED")
                + print("unix 2 [ ACC ] STREAM LISTENING 7 /run/buildkitd.sock");
        return Stream.of(
                new Fault("is missing", null, null),
                new Fault("may not be run", "", null),
                new Fault("prints nothing", "", null),
                new Fault("fails beside a table", table + "exit 1", null),
                new Fault("is killed within a row", table + "printf 'tcp 0 0 10.0.0.1:PORT'; kill -9 $$", null),
                new Fault("prints garbage", "printf '\\001\\377\\0\\n\\n\\n'; echo 'no support for AF INET' >&2", null),
                new Fault("cannot be started", "#!/no/such/interpreter", "Cannot run program"),
                new Fault("prints a line without end", "exec tr '\\0' x </dev/zero", ""),
                new Fault("hangs, and children too, which hold the pipe open", table
                        + "sleep 1000 & echo $! >>\"$DIR/pids\"\n"
                        + "sh -c 'echo $$ >>\"$1/pids\"; sleep 1000 & echo $! >>\"$1/pids\"; wait' sh \"$DIR\" &\n"
                        + "wait", NO_ANSWER));
    }

    @ParameterizedTest
    @MethodSource("faults")
    void theHookGoesByTheKernelWhenATool(Fault fault) throws IOException {
        try (Server server = Server.start(); Server.Connection build = server.connect()) {
            if (fault.script != null) { stub("netstat", fault.script.replace("PORT", "" + server.port())); }
            if (fault.name.equals("may not be run")) {
                Files.setPosixFilePermissions(directory.resolve("netstat"),
                        PosixFilePermissions.fromString("rw-r--r--"));
            }
            try (Hook hook = Hook.start(environment(server.port()))) {
                hook.awaitLog("1 connection to port " + server.port() + " from 127.0.0.1:"
                        + build.client().getLocalPort()).awaitChecks("1", 5);
                build.close();
                assertThat(hook.exitCode()).isZero();
                assertThat(hook.messages("warning")).isEmpty();
                assertThat(hook.messages("info").stream().filter(line -> line.contains("Could not use"))).as("once")
                        .hasSize(fault.reason == null ? 0 : 1).allMatch(line -> line.contains(
                                "Could not use netstat, and will not try again: " + fault.reason));
                if (fault.reason != null) { assertThat(starts()).isLessThanOrEqualTo(1); }
                assertThat(pids()).noneMatch(Tools::running);
            }
        }
    }

    /** In a place where no kernel's table shows the connection. */
    @ParameterizedTest
    @CsvSource({"netstat, tcp6 0 -5 :::PORT 10.9.8.7:4711 ESTABLISHED", "ss, tcp ESTAB 0 0 *:PORT 10.9.8.7:4711",
        "netstat, unix 3 [ ] STREAM CONNECTING 0 /x/buildkitd.sock", "ss, u_str ESTAB 0 0 /x/buildkitd.sock 7 * 8"})
    void aConnectionThatAToolShowsIsBelievedWhateverElseItDoes(String tool, String row) throws IOException {
        try (Server server = Server.start()) {
            String inOurLanguage = "[ \"$LC_ALL\" = C ] && " + print(row.replace("PORT", "" + server.port()));
            stub(tool, "echo garbage\n" + inOurLanguage + "printf more; exit 3");
            Map<String, String> env = environment(server.port());
            env.put("LC_ALL", "de_DE.UTF-8");
            try (Hook hook = Hook.start(env)) {
                hook.awaitLog(row.startsWith("u") ? "1 connection to buildkitd.sock."
                        : "1 connection to port " + server.port() + " from " + PEER + ".").awaitChecks("1", 5);
                stub(tool, "exit 3");
                assertThat(hook.exitCode()).isZero();
                assertThat(hook.messages("warning")).isEmpty();
            }
        }
    }

    @Test
    void ssIsAskedWhenNetstatFails() throws IOException {
        try (Server server = Server.start()) {
            stub("netstat", "#!/no/such/interpreter");
            stub("ss", print("tcp ESTAB 0 0 *:" + server.port() + " " + PEER));
            try (Hook hook = Hook.start(environment(server.port()))) {
                hook.awaitLog("1 connection to port " + server.port() + " from " + PEER);
                stub("ss", "#!/no/such/interpreter");
                assertThat(hook.exitCode()).isZero();
                assertThat(hook.messages("info").stream().filter(line -> line.contains("Could not use"))).hasSize(2);
            }
        }
    }

    /** It cannot make a look quiet, and to start it is dear. */
    @Test
    void aToolIsAskedAtTheBeginningOfTheQuietTimeAndIsBelievedAtItsEnd() throws IOException {
        Path asked = directory.resolve("asked");
        try (Server server = Server.start()) {
            String busy = print("tcp 0 0 10.0.0.1:" + server.port() + " " + PEER + " ESTABLISHED");
            stub("netstat", "[ -e '" + asked + "' ] && " + busy + ": >'" + asked + "'");
            Map<String, String> env = environment(server.port());
            env.put("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "1");
            try (Hook hook = Hook.start(env)) {
                hook.awaitChecks("1", 3);
                List<String> checks = hook.checks();
                assertThat(checks.indexOf("1")).as("quiet checks by the kernel's word").isEqualTo(20);
                assertThat(checks.subList(20, checks.size())).containsOnly("1");
                stub("netstat", "echo >>'" + asked + "'");
                assertThat(hook.exitCode()).isZero();
                assertThat(Files.readAllLines(asked)).hasSizeBetween(2, 4);
            }
        }
    }

    // ---- A start that is held up, and no room for a process ---------------------------------------------------------

    /** A write lease on a file, see fcntl(2), keeps others from opening it for 45 s, so also from running it. */
    private Process holdUp(Path file) throws IOException {
        Process lease = new ProcessBuilder(Tools.require("perl").toString(), "-e", "$SIG{IO} = 'IGNORE'; $| = 1;"
                + " open(F, '+<', $ARGV[0]) && fcntl(F, 1024, 1) or exit 1; print qq(held\n); sleep 300",
                file.toString()).start();
        assumeTrue("held".equals(lease.inputReader().readLine()), "needs a file system with leases");
        return lease;
    }

    @Test
    void aToolWhoseStartIsHeldUpHasFiveSecondsToo() throws IOException {
        stub("netstat", "exit 0");
        Process lease = holdUp(directory.resolve("netstat"));
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.start(environment(server.port()))) {
            hook.awaitLog("Could not use netstat, and will not try again: " + NO_ANSWER).awaitChecks("1", 3);
            assertThat(hook.process().children().filter(ProcessHandle::isAlive)).isEmpty();
            build.close();
            assertThat(hook.exitCode()).isZero();
        } finally {
            lease.destroyForcibly();
        }
    }

    @Test
    void sigtermEndsTheHookThoughAStartIsHeldUp() throws IOException {
        stub("netstat", "exit 0");
        stub("ss", "exit 0");
        Process lease = holdUp(directory.resolve("netstat"));
        try (Hook hook = Hook.start(environment(1))) {
            Hook.waitUntil("the start is held up", () -> hook.process().children().findAny().isPresent());
            List<ProcessHandle> children = hook.process().descendants().toList();
            Duration before = hook.age();
            hook.process().destroy();
            assertThat(hook.exitCode()).isEqualTo(143);
            assertThat(hook.age().minus(before)).as("it does not wait for the 5 s").isLessThan(Duration.ofSeconds(4));
            Hook.waitUntil("no process is left", () -> children.stream().noneMatch(ProcessHandle::isAlive));
            assertThat(starts()).isZero();
        } finally {
            lease.destroyForcibly();
        }
    }

    @Test
    void whereNoProcessCanBeStartedTheHookTakesNoneAndGoesByTheKernel() throws IOException {
        Tools.requireRoot();
        Tools.openToEveryone(directory);
        stub("netstat", "exit 0");
        stub("ss", "exit 0");
        List<String> user = List.of(Tools.require("setpriv").toString(), "--reuid=64321", "--clear-groups");
        String prlimit = Tools.require("prlimit").toString();
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.run(Stream.of(user, Tools.javaCommandForEveryone(directory.resolve("jars")))
                        .flatMap(List::stream).toList(), environment(server.port()))) {
            hook.awaitChecks("1", 3); // its threads are there
            Hook.run(Stream.of(user, List.of(prlimit, "--pid=" + hook.process().pid(), "--nproc=0:0"))
                    .flatMap(List::stream).toList(), Map.of()).exitCode();
            hook.awaitLog("Could not use ss, and will not try again: ").awaitChecks("1", 20);
            assertThat(hook.process().children()).as("zombies too").isEmpty();
            build.close();
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("info").stream().filter(line -> line.contains("Could not use"))).hasSize(2);
        }
    }

    @Test
    void neitherZombiesNorOpenFilesPileUp() throws IOException {
        Tools.only(directory.resolve("real"), Map.of("netstat", Tools.require("netstat")));
        try (Server server = Server.start(); Server.Connection build = server.connect()) {
            Map<String, String> env = environment(server.port());
            env.putAll(Hook.env("CHECK_FREQUENCY_MS", 1, "PATH", directory.resolve("real")));
            try (Hook hook = Hook.start(env)) {
                hook.awaitChecks("1", 20);
                int filesBefore = openFiles(hook);
                hook.awaitChecks("1", 80);
                // while a tool is being started there are some more for a moment
                Hook.waitUntil("about " + filesBefore + " files are open", () -> openFiles(hook) <= filesBefore + 3);
                assertThat(hook.process().children().toList()).hasSizeLessThan(5);
            }
        }
    }

    // ---- The kernel's tables ---------------------------------------------------------------------------------------

    private static final String TCP_HEADING = "  sl  local_address rem_address   st tx_queue rx_queue \n";
    private static final String UNIX_HEADING = "Num       RefCount Protocol Flags    Type St Inode Path\n";
    private static final String UNIX_LISTENER = "0: 00000002 00000000 00010000 0001 01  4710 /x/prestop-stub.sock\n";
    private static final String UNIX_CONNECTION = "0: 00000003 00000000 00000000 0001 03  4711 /x/prestop-stub.sock\n";
    private static final String LISTENER = "   0: 00000000:0001 00000000:0000 0A 00000000:00000000\n";
    private static final String CONNECTION = "   1: 0100007F:0001 0708090A:1267 01 00000000:00000000\n";

    /** Starts a hook, not as root, whose /proc/net is a directory of the test's: port 1 and the socket listen there. */
    private Hook startWithTables(Map<String, String> more, String... args) throws IOException {
        Tools.requireRoot();
        Tools.openToEveryone(directory);
        Files.createDirectory(directory.resolve("net"));
        table("tcp", TCP_HEADING + LISTENER);
        table("unix", UNIX_HEADING + UNIX_LISTENER);
        Map<String, String> env = environment(1);
        env.putAll(more);
        return Hook.run(Stream.of(List.of("unshare", "--mount", "/bin/sh", "-c",
                "PATH=/usr/sbin:/usr/bin:/sbin:/bin mount --bind \"$0\" /proc/$$/net && exec \"$@\"",
                directory.resolve("net").toString()), Tools.nobody(),
                Tools.javaCommandForEveryone(directory.resolve("jars")), List.of(args))
                .flatMap(List::stream).toList(), env);
    }

    private void table(String name, String content, String... permissions) throws IOException {
        Path next = Files.writeString(directory.resolve("next"), content, StandardCharsets.ISO_8859_1);
        Files.setPosixFilePermissions(next,
                PosixFilePermissions.fromString(permissions.length == 0 ? "r--r--r--" : permissions[0]));
        Files.move(next, directory.resolve("net").resolve(name), StandardCopyOption.ATOMIC_MOVE);
    }

    /** A kernel without IPv6 has no tcp6. */
    @Test
    void theHookStaysWhileATableCannotBeReadAndSaysWhyAtEachNewReason() throws IOException {
        try (Hook hook = startWithTables(Map.of("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "3600"))) {
            hook.awaitLog("0 connections to port 1 and 0 to prestop-stub.sock.");
            table("tcp", TCP_HEADING + LISTENER + CONNECTION);
            table("unix", UNIX_HEADING + UNIX_LISTENER + UNIX_CONNECTION);
            hook.awaitLog("1 connection to port 1 from " + PEER + " and 1 to prestop-stub.sock.");
            table("unix", UNIX_HEADING + UNIX_LISTENER);
            hook.awaitLog("1 connection to port 1 from " + PEER + ". ");
            table("tcp6", "garbage 1\n"); // the connections may be in the other table
            awaitUnknown(hook, "/proc/net/tcp6 has a row that cannot be read: garbage 1.");
            table("tcp6", "rubbish 2\n"); // the same reason in other words
            hook.awaitChecks("unknown", Collections.frequency(hook.checks(), "unknown") + 5);
            table("tcp6", "", "---------");
            awaitUnknown(hook, "/proc/net/tcp6 (Permission denied)");
            table("tcp6", TCP_HEADING.replace("rem_", "remote_"));
            table("unix", UNIX_HEADING + "\n");
            awaitUnknown(hook, "/proc/net/unix has a row that cannot be read: .");
            table("unix", UNIX_HEADING + UNIX_CONNECTION.replace(" 03 ", " 07 "));
            awaitUnknown(hook, "unknown state of a socket of prestop-stub.sock");
            table("unix", UNIX_HEADING + UNIX_LISTENER.substring(0, 50));
            awaitUnknown(hook, "/proc/net/unix is cut off");
            Files.delete(directory.resolve("net/unix"));
            awaitUnknown(hook, "/proc/net/unix (No such file or directory)");
            assertThat(hook.messages("warning")).hasSize(6);
        }
    }

    private static void awaitUnknown(Hook hook, String reason) {
        hook.awaitLog("Cannot tell whether clients are connected to port 1 or prestop-stub.sock: " + reason);
        hook.awaitChecks("unknown", Collections.frequency(hook.checks(), "unknown") + 5);
        assertThat(hook.process().isAlive()).isTrue();
    }

    @Test
    void theQuietCountStartsFromZeroAfterATimeInWhichNothingWasKnown() throws IOException {
        try (Hook hook = startWithTables(Map.of("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "10",
                "CHECK_FREQUENCY_MS", "100"))) {
            hook.awaitChecks("0", 5);
            table("tcp", "");
            hook.awaitChecks("unknown", 2);
            table("tcp", TCP_HEADING + LISTENER);
            assertThat(hook.exitCode()).isZero();
            List<String> checks = hook.checks();
            assertThat(checks.size() - 1 - checks.lastIndexOf("unknown")).isEqualTo(101);
            assertThat(hook.messages("warning")).singleElement().asString().contains("/proc/net/tcp is cut off");
        }
    }

    @Test
    void withoutASocketNoTableOfUnixSocketsIsRead() throws IOException {
        try (Hook hook = startWithTables(Map.of("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "3600"), "--socket=")) {
            hook.awaitLog("0 connections to port 1. ");
            table("unix", UNIX_HEADING + "a socket's name may hold a newline\n");
            hook.awaitChecks("0", hook.checks().size() + 5);
            assertThat(hook.messages("warning")).isEmpty();
        }
    }

    /** BusyBox' netstat ends with 0 and an empty table where there is no /proc/net. */
    @ParameterizedTest
    @ValueSource(strings = {"busybox", "netstat"})
    void theHookStaysWhereThereIsNoProcNetButANetstat(String command) {
        Tools.requireRoot();
        Map<String, String> env = environment(1);
        env.put("PATH", Tools.only(directory.resolve("tools"), Map.of("netstat", Tools.require(command))));
        List<String> subset = List.of(Tools.require("unshare").toString(), "--mount", "/bin/sh", "-c",
                "PATH=/usr/sbin:/usr/bin:/sbin:/bin mount -t proc -o subset=pid proc /proc && exec \"$@\"", "sh");
        try (Hook hook = Hook.startWith(subset, env)) {
            hook.awaitChecks("unknown", 5);
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(hook.messages("warning")).last().asString().contains("Cannot tell");
        }
    }

    @Test
    void whereNobodyListensByTheKernelsTablesItCannotTellWhateverAToolShowsAndGivesUpInTime() throws IOException {
        stub("netstat", print("tcp 0 0 0.0.0.0:1 0.0.0.0:* LISTEN")
                + print("unix 2 [ ACC ] STREAM LISTENING 7 /x/prestop-stub.sock"));
        Map<String, String> env = environment(1);
        env.put("MAX_WAIT_SECONDS", "2");
        try (Hook hook = Hook.start(env)) {
            assertThat(hook.exitCode()).isEqualTo(124);
            assertThat(hook.checks()).containsOnly("unknown");
            assertThat(hook.messages("warning")).last().asString().contains("Giving up after MAX_WAIT_SECONDS, 2 s: "
                    + "Cannot tell whether clients are connected to port 1 or prestop-stub.sock:"
                    + " nothing listens on port 1 or prestop-stub.sock.");
        }
    }

    @Test
    void anErrorThatNobodyThoughtOfIsALookThatFailed() throws IOException {
        Predicate<Row> odd = row -> { throw new StackOverflowError(); };
        Endpoint port = new Endpoint("port 1", true, odd, List.of(KernelTable.unix));
        Look look = new Sockets(List.of(port), null).look(false);
        assertThat(look.isKnown()).isFalse();
        assertThat(look.describe(0)).endsWith(": java.lang.StackOverflowError");
    }

    // ---- Helpers ---------------------------------------------------------------------------------------------------

    /** A shell's line that prints the text as a line. */
    private static String print(String line) { return "printf '%s\\n' '" + line + "'\n"; }

    /** Each stub leaves its process id, and DIR names the place for those of its children. */
    private void stub(String tool, String script) throws IOException {
        if (script.startsWith("#!")) { // which nobody runs, so it may be written in place
            Path file = Files.writeString(directory.resolve(tool + ".new"), script);
            Files.setPosixFilePermissions(file, PosixFilePermissions.fromString("rwxr-xr-x"));
            Files.move(file, directory.resolve(tool), StandardCopyOption.REPLACE_EXISTING);
            return;
        }
        Tools.stub(directory.resolve(tool), "DIR='" + directory + "'\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\n"
                + "echo $$ | tee -a \"$DIR/starts\" >>\"$DIR/pids\"\n" + script);
    }

    /** Two quiet checks are enough to leave, each check is logged, and the PATH is the test's directory. */
    private Map<String, String> environment(int port) {
        return Hook.env("BUILDKITD_PORT", port, "CHECK_FREQUENCY_MS", 50, "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 0,
                "DEBUG", 1, "PATH", directory, port == 1 ? "BUILDKITD_SOCKET" : "NONE", SOCKET);
    }

    private static int openFiles(Hook hook) {
        return Path.of("/proc", "" + hook.process().pid(), "fd").toFile().list().length;
    }

    /** Of stubs and of what they have started. */
    private List<Long> pids() throws IOException { return read("pids").stream().map(Long::valueOf).toList(); }

    /** How often a stub was started. */
    private int starts() throws IOException { return read("starts").size(); }

    private List<String> read(String file) throws IOException {
        return Files.exists(directory.resolve(file)) ? Files.readAllLines(directory.resolve(file)) : List.of();
    }
}
