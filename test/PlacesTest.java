import static org.assertj.core.api.Assertions.assertThat;

import java.io.IOException;
import java.nio.file.*;
import java.util.*;
import java.util.stream.Stream;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.*;

/** The hook where containers put it: other users, namespaces, closed streams, read-only files. And how it is ended. */
class PlacesTest {

    private static final String LEAVES = "All build processes seem to have stopped";
    private static final String SYSTEM_PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
    /** Port 1234 is free in a network of one's own. 04D2 is its name in procfs, 0A is LISTEN. */
    private static final String LISTEN_ON_1234 = "busybox nc -ll -p 1234 -e sleep 1000 &\n"
            + "until grep -q ':04D2 .* 0A ' /proc/net/tcp /proc/net/tcp6; do sleep 0.05; done";
    private static final String[] OWN_NETWORK =
            {"unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"};

    @TempDir
    private Path directory;

    // ---- Whose connections it sees ---------------------------------------------------------------------------------

    /** The sockets are the user's who runs the tests; in a pod, buildkitd's. */
    @ParameterizedTest
    @ValueSource(strings = {"netstat", "none"})
    void aHookThatSeesNoOwnerOfASocketStillWaitsForIt(String tool) throws Exception {
        Tools.requireRoot();
        Tools.openToEveryone(directory);
        Path file = directory.resolve("b.sock");
        List<String> command = concat(List.of("unshare", "--pid", "--fork", "--mount-proc"), nobodysHook());
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Server.OnSocket onSocket = new Server.OnSocket(file); AutoCloseable other = onSocket.connect();
                Hook hook = Hook.run(command, leavingAtOnce(server.port(), "BUILDKITD_SOCKET", file, "DEBUG", 1,
                        "PATH", tool.equals("none") ? "/nowhere"
                                : Tools.only(directory.resolve("tools"), Map.of(tool, Tools.require(tool)))))) {
            hook.awaitLog("1 connection to port " + server.port() + " from 127.0.0.1:"
                    + build.client().getLocalPort() + " and 1 to " + file + ".");
            build.close();
            hook.awaitChecks("1", 5);
            assertThat(hook.process().isAlive()).isTrue();
            other.close();
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("warning")).isEmpty();
        }
    }

    @ParameterizedTest(name = "{0}")
    @CsvSource({"127.0.0.1, echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6", "[::1], ip -4 addr flush dev lo"})
    void itWorksInANetworkWithOneFamilyOfAddresses(String address, String setup) throws IOException {
        Tools.requireRoot();
        Tools.require("ip");
        Tools.require("busybox");
        Path buildEnds = directory.resolve("build ends");
        String script = String.join("\n", SYSTEM_PATH,
                "ip link set lo up",
                setup,
                LISTEN_ON_1234,
                "busybox nc " + address + " 1234 -e sleep 1000 & build=$!",
                "PATH=/nowhere \"$@\" & hook=$!",
                "until [ -e '" + buildEnds + "' ]; do sleep 0.05; done",
                "kill $build",
                "wait $hook");
        try (Hook hook = Hook.run(shell(script, Hook.javaCommand(), OWN_NETWORK),
                leavingAtOnce(1234, "DEBUG", 1))) {
            hook.awaitLog("1 connection to port 1234 from " + address + ":").awaitChecks("1", 5);
            assertThat(hook.process().isAlive()).isTrue();
            Files.createFile(buildEnds);
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("warning")).isEmpty();
        }
    }

    // ---- Where it cannot see buildkitd -----------------------------------------------------------------------------

    /** As with rootlesskit where it gives buildkitd a network of its own. */
    @Test
    void inAnotherNetworkThanBuildkitdsItStays() {
        Tools.requireRoot();
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.startWith(List.of("unshare", "--net"), Hook.quick(server.port()), "--debug")) {
            hook.awaitChecks("unknown", 25);
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(hook.messages("warning")).singleElement().asString().contains("nothing listens on port");
        }
    }

    /** Of the defaults one is enough. What the user named must be there, by the name that the kernel knows. */
    @ParameterizedTest(name = "port {0}, named: {1}; socket {2}, named: {3}")
    @CsvSource({"there, false, no.sock, false, ''", "1, false, {}/b.sock, false, ''",
        "there, true, {}/b.sock, true, ''",
        "1, false, no.sock, false, port 1 or no.sock", "1, true, no.sock, false, port 1 or no.sock",
        "1, true, {}/b.sock, false, port 1", "there, false, no.sock, true, no.sock", "there, true, no.sock, false, ''",
        "1, false, {}/b.sock, true, ''", "1, false, , false, port 1", "there, true, , false, ''",
        "there, true, {}/link.sock, true, {}/link.sock", "there, true, {}//b.sock, true, {}//b.sock",
        "there, true, {}/link/b.sock, true, {}/link/b.sock", "there, true, other/b.sock, true, other/b.sock"})
    void itKnowsOnlyWhereThereAreTheListenersThatThereMustBe(String port, boolean portIsNamed, String socket,
            boolean socketIsNamed, String missing) throws IOException {
        Path file = directory.resolve("b.sock");
        Files.createSymbolicLink(directory.resolve("link.sock"), file);
        Files.createSymbolicLink(directory.resolve("link"), directory);
        try (Server server = Server.start(); Server.OnSocket unix = new Server.OnSocket(file)) {
            List<Endpoint> endpoints = new ArrayList<>(List.of(
                    Endpoint.port(port.equals("there") ? server.port() : 1, portIsNamed)));
            if (socket != null) {
                endpoints.add(Endpoint.socket(socket.replace("{}", "" + directory), socketIsNamed));
            }
            Look look = new Sockets(endpoints, null).look(false);
            assertThat(look.isKnown()).isEqualTo(missing.isEmpty());
            assertThat(look.describe(0)).endsWith(
                    missing.isEmpty() ? "" : ": nothing listens on " + missing.replace("{}", "" + directory));
        }
    }

    @Test
    void aSocketThatIsSetByAFlagMustHaveAListenerToo() {
        Tools.requireRoot();
        Tools.require("ip");
        Tools.require("busybox");
        String script = String.join("\n", SYSTEM_PATH, "ip link set lo up", LISTEN_ON_1234,
                "\"$@\" --once && \"$@\" --once --socket=no.sock");
        try (Hook hook = Hook.run(shell(script, Hook.javaCommand(), OWN_NETWORK), Map.of())) {
            assertThat(hook.exitCode()).isEqualTo(1);
            assertThat(hook.out()).containsExactly("0");
            assertThat(hook.messages("warning")).singleElement().asString().endsWith("nothing listens on no.sock.");
        }
    }

    // ---- What it needs ---------------------------------------------------------------------------------------------

    /** A namespace of some thousand services gives each pod such a one. What is too much for a tool is told once. */
    @ParameterizedTest
    @ValueSource(ints = {20_000, 40_000})
    void itWaitsWithAnEnvironmentOfMegabytes(int variables) {
        String script = String.join("\n", "ulimit -s 64000", "export NAME='\u00e9'", "i=0",
                "while [ $i -lt " + variables + " ]; do",
                "export SERVICE_${i}_PORT_80_TCP_ADDR=tcp://10.100.200.7:80; i=$((i + 1)); done", "exec \"$@\"");
        Tools.require("netstat");
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.run(shell(script, Hook.javaCommand()), leavingAtOnce(server.port(), "DEBUG", 1))) {
            hook.awaitChecks("1", 5);
            assertThat(hook.process().isAlive()).isTrue();
            build.close();
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("warning")).isEmpty();
        }
    }

    @Test
    void itNeedsNoFileItCanWriteAndNeitherHomeNorPath() {
        Tools.requireRoot();
        // The test's files are in /tmp, perhaps: they are still there in /mnt.
        String script = String.join("\n", "set -e", SYSTEM_PATH,
                "mount --bind '" + directory + "' /mnt",
                "mount -t tmpfs -o ro none /tmp",
                "mount -o remount,ro,bind /mnt",
                "mount -o remount,ro,bind /",
                "! touch /mnt/x /tmp/x /x /var/x 2>/dev/null",
                "cd /",
                "exec env -u PATH -u HOME -u PWD \"$@\"");
        List<String> java = Tools.javaCommandForEveryone(directory.resolve("jars")).stream()
                .map(word -> word.replace(directory.toString(), "/mnt")).toList();
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.run(shell(script, java, "unshare", "--mount"),
                        leavingAtOnce(server.port(), "DEBUG", 1))) {
            hook.awaitChecks("1", 5);
            build.close();
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("warning")).isEmpty();
        }
    }

    // ---- Where it writes -------------------------------------------------------------------------------------------

    /** Not opened for appending by PID 1, so that only the hook's own way to open it can save what is there. */
    @Test
    void theLogIsAppendedToTheStderrOfPid1InAPodAndOnlyThere() throws IOException {
        Tools.requireRoot();
        Path log = directory.resolve("log");
        List<String> command = pid1("exec 2>'" + log + "'; echo a line of buildkitd >&2", Hook.javaCommand());
        try (Server server = Server.start(); Hook outside = Hook.run(command, leavingAtOnce(server.port()))) {
            assertThat(outside.exitCode()).isZero();
            assertThat(outside.messages("info")).last().asString().contains(LEAVES);
            assertThat(Files.readAllLines(log)).containsExactly("a line of buildkitd");
            Hook hook = Hook.run(command, inPod(server.port()));
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.err()).isEmpty();
            assertThat(hook.out()).isEmpty();
            assertThat(Files.readAllLines(log)).first().isEqualTo("a line of buildkitd");
            assertThat(Files.readAllLines(log)).last().asString().contains(LEAVES);
            assertThat(Files.readAllLines(log).stream().skip(1).map(Hook::json)).hasSize(3);
        }
    }

    @ParameterizedTest(name = "{0}")
    @CsvSource({"another user's, exec 2>>/dev/null", "'that of pause, which is /dev/null', exec 2>/dev/null",
        "a pipe that nobody reads, exec 2>&4", "full, exec 2>/dev/full", "closed, exec 2>&-"})
    void theLogGoesToTheHooksOwnStderrWhenThatOfPid1Is(String name, String setup) throws IOException {
        Tools.requireRoot();
        Tools.openToEveryone(directory);
        List<String> command = pid1(setup, name.startsWith("another user") ? nobodysHook() : Hook.javaCommand());
        // 4 is a pipe whose reader has ended when the hook starts
        String withPipe = "exec 3>&1 5>&2\n{ sleep 0.2; \"$@\" >&3 2>&5 4>&6 & wait $!; } 6>&1 | :";
        try (Server server = Server.start(); Hook hook = Hook.run(shell(withPipe, command), inPod(server.port()))) {
            hook.awaitLog(LEAVES);
            hook.exitCode();
            assertThat(hook.messages("info")).first().asString().contains("Waiting for build processes");
        }
    }

    @Test
    void theLogGoesToTheHooksOwnStderrWhenThatOfPid1IsASocket() {
        Tools.requireRoot();
        try (Server server = Server.start(); Server logServer = Server.at("127.0.0.1")) {
            String script = "exec 3>&2; exec " + Tools.require("busybox") + " nc 127.0.0.1 " + logServer.port()
                    // an absolute path, or BusyBox would take its own unshare, which has fewer options
                    + " -e " + Tools.require("unshare") + " --pid --fork --mount-proc --kill-child"
                    + " /bin/sh -c '\"$@\" 2>&3 & wait $!' sh \"$@\"";
            try (Hook hook = Hook.run(shell(script, Hook.javaCommand()), inPod(server.port()))) {
                assertThat(hook.exitCode()).isZero();
                assertThat(hook.messages("info")).last().asString().contains(LEAVES);
            }
        }
    }

    @Test
    void aFullPipeThatNobodyReadsDoesNotStopTheWait() throws IOException {
        Path code = directory.resolve("code");
        // The reader lives for longer than the hook may, and reads nothing; 64 KiB fill its pipe.
        String script = "{ head -c 65536 /dev/zero; \"$@\" 2>&1; echo $? >'" + code + "'; } | sleep 900";
        try (Server server = Server.start(); Hook hook = Hook.run(shell(script, Hook.javaCommand()),
                Hook.env("BUILDKITD_PORT", server.port(), "CHECK_FREQUENCY_MS", 7, "DEBUG", 1,
                "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 1))) { // 147 lines, of which 100 can wait to be written
            Hook.waitUntil("the hook ends", () -> code.toFile().length() > 0);
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(code).hasContent("0");
        }
    }

    @Test
    void aPipeThatIsReadSlowlyGetsTheLastLine() throws IOException {
        Path looks = Files.createFile(directory.resolve("looks"));
        Path log = directory.resolve("log");
        Tools.stub(directory.resolve("netstat"), "echo >>'" + looks + "'");
        // The pipe is full when the two looks are over, and read a little later.
        String script = "{ head -c 65536 /dev/zero; \"$@\" 2>&1; } |"
                + " { " + SYSTEM_PATH + "; until [ $(wc -l <'" + looks + "') -ge 2 ]; do sleep 0.02; done; sleep 0.5;"
                + " tr -d '\\0' >'" + log + "'; }";
        try (Server server = Server.start(); Hook hook = Hook.run(shell(script, Hook.javaCommand()),
                leavingAtOnce(server.port(), "PATH", directory + ":" + System.getenv("PATH")))) {
            assertThat(hook.exitCode()).isZero();
            assertThat(Files.readAllLines(log)).last().asString().contains(LEAVES);
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {">&-", "2>&-", "<&- >&- 2>&-", "</dev/null >/dev/full 2>&1"})
    void aLogThatCannotBeWrittenStopsNothing(String streams) throws IOException {
        Path looks = Files.createFile(directory.resolve("looks"));
        Tools.stub(directory.resolve("netstat"), "echo >>'" + looks + "'");
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.run(shell("exec \"$@\" " + streams, Hook.javaCommand()),
                        leavingAtOnce(server.port(), "PATH", directory))) {
            Hook.waitUntil("it has looked 5 times", () -> looks.toFile().length() >= 5 || !hook.process().isAlive());
            assertThat(hook.process().isAlive()).isTrue();
            build.close();
            assertThat(hook.exitCode()).isZero();
        }
    }

    // ---- How it is ended -------------------------------------------------------------------------------------------

    @ParameterizedTest(name = "SIG{0}, exit code {1}")
    @CsvSource({"TERM, 143", "INT, 130"})
    void aSignalEndsItAndItsToolWithIt(String signal, int exitCode) throws IOException {
        Path started = directory.resolve("started");
        Tools.stub(directory.resolve("netstat"), SYSTEM_PATH + "\nsleep 1000 &\n"
                + "printf '%s\\n' $! $$ > '" + started + "'; wait");
        // A shell starts its background jobs, so perhaps these tests, with SIGINT ignored.
        try (Hook hook = Hook.startWith(List.of("env", "--default-signal=INT"),
                Hook.env("BUILDKITD_PORT", 1, "PATH", directory))) {
            Hook.waitUntil("the tool hangs", () -> started.toFile().length() > 0);
            Hook.run(List.of("sh", "-c", "kill -" + signal + " " + hook.process().pid()), Map.of());
            assertThat(hook.exitCode()).isEqualTo(exitCode);
            for (long pid : pids(started)) { Hook.waitUntil("the tool is gone", () -> !Tools.running(pid)); }
        } finally {
            Tools.end(pids(started).stream());
        }
    }

    /** A hook whose JVM takes its time to end, as on a busy machine. */
    static final class SlowEnd {
        public static void main(String... args) {
            Runtime.getRuntime().addShutdownHook(new Thread(() -> Hook.pause(2000)));
            BuildkitPrestop.main(args);
        }
    }

    @Test
    void noToolIsStartedAfterASignal() throws IOException {
        List<String> command = new ArrayList<>(Hook.javaCommand());
        command.set(command.indexOf("-cp") + 1, System.getProperty("java.class.path"));
        command.set(command.size() - 1, SlowEnd.class.getName());
        Path started = directory.resolve("started");
        Tools.stub(directory.resolve("netstat"), "echo $$ >> '" + started + "'\n" + SYSTEM_PATH + "\nexec sleep 1000");
        try (Hook hook = Hook.run(command, Hook.env("BUILDKITD_PORT", 1, "CHECK_FREQUENCY_MS", 1, "PATH", directory))) {
            Hook.waitUntil("the first tool hangs", () -> started.toFile().length() > 0);
            hook.process().destroy();
            assertThat(hook.exitCode()).isEqualTo(143);
            assertThat(pids(started)).hasSize(1);
        } finally {
            Tools.end(pids(started).stream());
        }
    }

    // ---- Helpers ---------------------------------------------------------------------------------------------------

    private static List<Long> pids(Path file) throws IOException {
        return Files.readAllLines(file).stream().map(Long::valueOf).toList();
    }

    /** The hook as an unprivileged user. */
    private List<String> nobodysHook() {
        return concat(Tools.nobody(), Tools.javaCommandForEveryone(directory.resolve("jars")));
    }

    /** A command that gives another to a script as its arguments. */
    private static List<String> shell(String script, List<String> command, String... wrapper) {
        return concat(List.of(wrapper), concat(List.of("/bin/sh", "-c", script, "sh"), command));
    }

    private static List<String> concat(List<String> first, List<String> second) {
        return Stream.concat(first.stream(), second.stream()).toList();
    }

    /** Runs the command with its own stderr in a PID namespace whose PID 1 is a shell that has done the setup. */
    private static List<String> pid1(String setup, List<String> command) {
        // In the background: for a command in the foreground some shells redirect their own stderr meanwhile.
        return shell("exec 3>&2; " + setup + "; \"$@\" 2>&3 & wait $!", command,
                "unshare", "--pid", "--fork", "--mount-proc", "--kill-child");
    }

    private static Map<String, String> inPod(int port) {
        return leavingAtOnce(port, "KUBERNETES_SERVICE_HOST", "10.0.0.1");
    }

    /** For a hook that leaves when two checks see nobody; with more settings, given in turn. */
    private static Map<String, String> leavingAtOnce(int port, Object... namesAndValues) {
        Map<String, String> env = Hook.quick(port);
        env.put("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0");
        env.putAll(Hook.env(namesAndValues));
        return env;
    }
}
