import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import org.junit.jupiter.api.RepeatedTest;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.EnumSource;
import org.junit.jupiter.params.provider.MethodSource;

/** The hook where containers put it: other users, namespaces, closed streams, read-only files. And how it is ended. */
class PlacesTest {

    private static final String LEAVES = "All build processes seem to have stopped";
    private static final String SYSTEM_PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";

    @TempDir
    private Path directory;

    /** A command, alone on the PATH, and the source that uses it. */
    enum Source {
        netstat("netstat", "netstat"), busyboxNetstat("netstat", "busybox"), ss("ss", "ss"), procfs("procfs", null);

        private final String name;
        private final String command;

        Source(String name, String command) {
            this.name = name;
            this.command = command;
        }

        /** Leaves at the first check that sees nobody. */
        Map<String, String> environment(int port, Path directory) {
            Map<String, String> env = Hook.quick(port);
            env.put("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0");
            env.put("DEBUG", "1");
            env.put("CONNECTION_SOURCE", name);
            Map<String, Path> links = command == null ? Map.of() : Map.of(name, Tools.require(command));
            env.put("PATH", Tools.only(directory.resolve("tools"), links));
            return env;
        }
    }

    // ---- Whose connections it sees ---------------------------------------------------------------------------------

    enum Place {
        anotherUser, anotherUserInAnotherPidNamespace;

        List<String> wrapper() {
            List<String> wrapper = new ArrayList<>();
            if (this == anotherUserInAnotherPidNamespace) {
                wrapper.addAll(List.of(Tools.require("unshare").toString(), "--pid", "--fork", "--mount-proc"));
            }
            wrapper.addAll(Tools.nobody());
            return wrapper;
        }
    }

    static Stream<Arguments> placesAndSources() {
        return Stream.of(Place.values())
                .flatMap(place -> Stream.of(Source.values()).map(source -> Arguments.of(place, source)));
    }

    /** The sockets are the user's who runs the tests; in a pod, buildkitd's. */
    @ParameterizedTest
    @MethodSource("placesAndSources")
    void aHookThatSeesNoOwnerOfASocketStillWaitsForIt(Place place, Source source) throws Exception {
        Tools.requireRoot();
        Tools.openToEveryone(directory);
        Path file = directory.resolve("b.sock");
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Server.OnSocket onSocket = new Server.OnSocket(file); AutoCloseable other = onSocket.connect()) {
            Map<String, String> env = source.environment(server.port(), directory);
            env.put("BUILDKITD_SOCKET", file.toString());
            try (Hook hook = Hook.run(everyones(place.wrapper()), env)) {
                hook.awaitLog("1 connection to port " + server.port() + " from 127.0.0.1:"
                        + build.client().getLocalPort() + " and 1 to " + file + ".");
                build.close();
                hook.awaitChecks("1", 10);
                assertThat(hook.process().isAlive()).isTrue();
                other.close();
                assertThat(hook.exitCode()).isZero();
                assertThat(hook.messages("warning")).isEmpty();
            }
        }
    }

    enum Network {
        ipv4Only("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6", "127.0.0.1"),
        ipv6Only("ip -4 addr flush dev lo", "::1");

        private final String setup;
        private final String address;

        Network(String setup, String address) {
            this.setup = setup;
            this.address = address;
        }
    }

    static Stream<Arguments> networksAndSources() {
        return Stream.of(Network.values())
                .flatMap(network -> Stream.of(Source.values()).map(source -> Arguments.of(network, source)));
    }

    @ParameterizedTest
    @MethodSource("networksAndSources")
    void itWorksInANetworkWithOneFamilyOfAddresses(Network network, Source source) throws IOException {
        Tools.requireRoot();
        Tools.require("ip");
        Tools.require("busybox");
        Path buildEnds = directory.resolve("build ends");
        // Port 1234 is free in a network of one's own. 04D2 is its name in procfs, 0A is LISTEN.
        String script = String.join("\n",
                "hook_path=$PATH; " + SYSTEM_PATH,
                "ip link set lo up",
                network.setup,
                "busybox nc -ll -p 1234 -e sleep 1000 &",
                "until grep -q ':04D2 .* 0A ' /proc/net/tcp /proc/net/tcp6; do sleep 0.05; done",
                "busybox nc " + network.address + " 1234 -e sleep 1000 & build=$!",
                "PATH=$hook_path \"$@\" & hook=$!",
                "until [ -e '" + buildEnds + "' ]; do sleep 0.05; done",
                "kill $build",
                "wait $hook");
        List<String> command = shell(script, "unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child");
        command.addAll(Hook.javaCommand());
        try (Hook hook = Hook.run(command, source.environment(1234, directory))) {
            String address = network == Network.ipv6Only ? "[::1]" : network.address;
            hook.awaitLog("1 connection to port 1234 from " + address + ":");
            hook.awaitChecks("1", 10);
            assertThat(hook.process().isAlive()).isTrue();
            Files.createFile(buildEnds);
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("warning")).isEmpty();
        }
    }

    // ---- Where it cannot see buildkitd -----------------------------------------------------------------------------

    /** Names by which the kernel does not know the socket, and a port that is not buildkitd's. */
    @ParameterizedTest
    @CsvSource({"BUILDKITD_SOCKET, typo.sock", "BUILDKITD_SOCKET, {}/link.sock", "BUILDKITD_SOCKET, {}//b.sock",
        "BUILDKITD_SOCKET, {}/link/b.sock", "BUILDKITD_SOCKET, other/b.sock", "BUILDKITD_PORT, 1"})
    void whereNothingListensOnWhatTheUserNamedItCannotTell(String variable, String value) throws Exception {
        Path socket = directory.resolve("b.sock");
        Files.createSymbolicLink(directory.resolve("link.sock"), socket);
        Files.createSymbolicLink(directory.resolve("link"), directory);
        List<String> sources = List.of("auto", Tools.require("netstat").getFileName().toString(),
                Tools.require("ss").getFileName().toString(), "procfs");
        try (Server server = Server.start(); Server.OnSocket unix = new Server.OnSocket(socket)) {
            for (String source : sources) {
                // With another name the connection is there and not seen; with another port there is none.
                try (AutoCloseable build = variable.equals("BUILDKITD_PORT") ? () -> { } : unix.connect()) {
                    Map<String, String> env = Hook.quick(server.port());
                    env.put("BUILDKITD_SOCKET", socket.toString());
                    env.put("CONNECTION_SOURCE", source);
                    String name = value.replace("{}", directory.toString());
                    env.put(variable, name);
                    try (Hook once = Hook.start(env, "--once")) {
                        assertThat(once.exitCode()).as(source).isEqualTo(1);
                        assertThat(once.out()).as(source).isEmpty();
                        assertThat(once.messages("warning")).as(source).singleElement().asString().contains(
                                ": nothing listens on " + (name.equals("1") ? "port " : "") + name + ".");
                    }
                }
            }
        }
    }

    @ParameterizedTest
    @EnumSource(Source.class)
    void whereNothingListensItStays(Source source) {
        try (Hook hook = Hook.start(source.environment(1, directory))) { // nobody uses that port
            hook.awaitChecks("unknown", 20);
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(hook.messages("warning")).containsExactly("[PreStop Hook] Cannot tell whether clients are"
                    + " connected to port 1 or buildkitd.sock: nothing listens on port 1 or buildkitd.sock."
                    + " Waited 0 s so far.");
        }
    }

    /** As with rootlesskit where it gives buildkitd a network of its own. */
    @Test
    void inAnotherNetworkThanBuildkitdsItStays() {
        Tools.requireRoot();
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.startWith(List.of("unshare", "--net"), Hook.quick(server.port()), "--debug")) {
            hook.awaitChecks("unknown", 60);
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(hook.messages("warning")).singleElement().asString().contains("nothing listens on port");
        }
    }

    /** Of the defaults one is enough. What the user named, by environment or flag, must be there. */
    @ParameterizedTest(name = "listens: {0}, named: {1}, empty socket: {2}")
    @CsvSource({"both, none, false, ''", "port, none, false, ''", "socket, none, false, ''",
        "none, none, false, port or socket", "socket, port, false, port", "port, socket, false, socket",
        "port, port, false, ''", "socket, socket, false, ''", "port, both, false, socket", "socket, both, false, port",
        "none, both, false, port or socket", "none, port, false, port or socket", "port, socket, true, ''",
        "none, none, true, port", "none, socket, true, port"})
    void itIsContentWithTheListenersThatThereMustBe(String listens, String named, boolean emptySocket, String missing)
            throws IOException {
        Path socket = directory.resolve("b.sock");
        try (Server server = Server.start(); Server.OnSocket unix = new Server.OnSocket(socket)) {
            BuildkitPrestop settings = new BuildkitPrestop();
            settings.source = BuildkitPrestop.ConnectionSource.procfs;
            settings.port = listens.matches("both|port") ? server.port() : 1;
            settings.socket = emptySocket ? "" : listens.matches("both|socket") ? socket.toString() : "no-such.sock";
            settings.portIsNamed = named.matches("both|port");
            settings.socketIsNamed = named.matches("both|socket");
            Sockets sockets = new Sockets(settings);
            if (missing.isEmpty()) {
                assertThat(sockets.askAll().count()).isZero();
            } else {
                assertThatThrownBy(sockets::askAll).isInstanceOf(IOException.class).hasMessage("nothing listens on "
                        + missing.replace("port", "port " + settings.port).replace("socket", settings.socket));
            }
        }
    }

    // ---- Where it may look -----------------------------------------------------------------------------------------

    /** A namespace of some thousand services gives each pod such a one. What is too much for a tool is procfs' turn. */
    @ParameterizedTest
    @EnumSource(Source.class)
    void itWaitsWithAnEnvironmentOfMegabytes(Source source) {
        String script = String.join("\n", "ulimit -s 64000", "export NAME='\u00e9'", "i=0",
                "while [ $i -lt " + (source.command == null ? 80_000 : 20_000) + " ]; do",
                "export SERVICE_${i}_PORT_80_TCP_ADDR=tcp://10.100.200.7:80; i=$((i + 1)); done", "exec \"$@\"");
        List<String> command = shell(script);
        command.addAll(Hook.javaCommand());
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.run(command, source.environment(server.port(), directory))) {
            hook.awaitChecks("1", 10);
            assertThat(hook.process().isAlive()).isTrue();
            build.close();
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("warning")).isEmpty();
        }
    }

    // ---- Where it writes -------------------------------------------------------------------------------------------

    /** Not opened for appending by PID 1, so that only the hook's own way to open it can save what is there. */
    @Test
    void theLogIsAppendedToTheStderrOfPid1InAPod() throws IOException {
        Tools.requireRoot();
        Path log = directory.resolve("log");
        List<String> command = pid1("exec 2>'" + log + "'; echo a line of buildkitd >&2", Hook.javaCommand());
        try (Server server = Server.start(); Hook hook = Hook.run(command, inPod(server.port()))) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.err()).isEmpty();
            assertThat(hook.out()).isEmpty();
            assertThat(Files.readAllLines(log)).first().isEqualTo("a line of buildkitd");
            assertThat(Files.readAllLines(log)).last().asString().contains(LEAVES);
            assertThat(Files.readAllLines(log).stream().skip(1).map(Hook::json)).hasSizeGreaterThan(2);
        }
    }

    static Stream<Arguments> useless() {
        return Stream.of(
                Arguments.of("another user's", "exec 2>>/dev/null", true),
                Arguments.of("that of pause, which is /dev/null", "exec 2>/dev/null", false),
                Arguments.of("a pipe that nobody reads", "exec 2>&4", false),
                Arguments.of("full", "exec 2>/dev/full", false),
                Arguments.of("closed", "exec 2>&-", false));
    }

    @ParameterizedTest(name = "{0}")
    @MethodSource("useless")
    void theLogGoesToTheHooksOwnStderrWhenThatOfPid1Is(String name, String setup, boolean otherUser)
            throws IOException {
        Tools.requireRoot();
        Tools.openToEveryone(directory);
        List<String> command = pid1(setup, otherUser ? everyones(Tools.nobody()) : Hook.javaCommand());
        // 4 is a pipe whose reader has ended when the hook starts
        List<String> withPipe = shell("exec 3>&1 5>&2\n{ sleep 0.2; \"$@\" >&3 2>&5 4>&6 & wait $!; } 6>&1 | :");
        withPipe.addAll(command);
        try (Server server = Server.start(); Hook hook = Hook.run(withPipe, inPod(server.port()))) {
            hook.awaitLog(LEAVES);
            hook.exitCode();
            assertThat(hook.messages("info")).first().asString().contains("Waiting for build processes");
        }
    }

    @Test
    void theLogGoesToTheHooksOwnStderrWhenThatOfPid1IsASocket() {
        Tools.requireRoot();
        String busybox = Tools.require("busybox").toString();
        try (Server server = Server.start(); Server logServer = Server.at("127.0.0.1")) {
            List<String> command = shell("exec 3>&2; exec " + busybox + " nc 127.0.0.1 " + logServer.port()
                    // an absolute path, or BusyBox would take its own unshare, which has fewer options
                    + " -e " + Tools.require("unshare") + " --pid --fork --mount-proc --kill-child"
                    + " /bin/sh -c '\"$@\" 2>&3 & wait $!' sh \"$@\"");
            command.addAll(Hook.javaCommand());
            try (Hook hook = Hook.run(command, inPod(server.port()))) {
                assertThat(hook.exitCode()).isZero();
                assertThat(hook.messages("info")).last().asString().contains(LEAVES);
            }
        }
    }

    @Test
    void aFullPipeThatNobodyReadsDoesNotStopTheWait() throws IOException {
        Path code = directory.resolve("code");
        // The reader lives for longer than the hook may, and reads nothing; 64 KiB fill its pipe.
        List<String> command = shell("{ head -c 65536 /dev/zero; \"$@\" 2>&1; echo $? >'" + code + "'; } | sleep 60");
        command.addAll(Hook.javaCommand());
        try (Server server = Server.start(); Hook hook = Hook.run(command, Hook.env("BUILDKITD_PORT", server.port(),
                "CHECK_FREQUENCY_MS", 20, "DEBUG", 1,
                "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 4))) { // 200 lines, of which 100 can wait to be written
            Hook.waitUntil("the hook ends", () -> Files.exists(code));
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(code).hasContent("0");
        }
    }

    @Test
    void aPipeThatIsReadSlowlyGetsTheLastLine() throws IOException {
        String real = Tools.require("ss").toString();
        Path looked = directory.resolve("looked");
        Path log = directory.resolve("log");
        Tools.stub(directory.resolve("ss"), ">'" + looked + "'; exec " + real + " \"$@\"");
        // The pipe is full when the only look is over, and read a little later.
        List<String> command = shell("{ head -c 65536 /dev/zero; \"$@\" 2>&1; } |"
                + " { until [ -e '" + looked + "' ]; do sleep 0.02; done; sleep 0.2; tr -d '\\0' >'" + log + "'; }");
        command.addAll(Hook.javaCommand());
        try (Server server = Server.start()) {
            Map<String, String> env = Hook.quick(server.port());
            env.put("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0");
            env.put("CONNECTION_SOURCE", "ss");
            env.put("PATH", directory + ":" + System.getenv("PATH"));
            try (Hook hook = Hook.run(command, env)) {
                assertThat(hook.exitCode()).isZero();
                assertThat(Files.readAllLines(log)).last().asString().contains(LEAVES);
            }
        }
    }

    @Test
    void outsideOfAPodTheLogDoesNotGoToPid1() throws IOException {
        Tools.requireRoot();
        Path log = Files.createFile(directory.resolve("log"));
        try (Server server = Server.start();
                Hook hook = Hook.run(pid1("exec 2>>'" + log + "'", Hook.javaCommand()), Hook.quick(server.port()))) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("info")).last().asString().contains(LEAVES);
            assertThat(log).isEmptyFile();
        }
    }

    static Stream<Arguments> streamsAndTools() {
        return Stream.of(">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/full 2>&1")
                .flatMap(streams -> Stream.of("netstat", "ss").map(tool -> Arguments.of(streams, tool)));
    }

    @ParameterizedTest(name = "{0} {1}")
    @MethodSource("streamsAndTools")
    void aLogThatCannotBeWrittenStopsNothing(String streams, String tool) throws IOException {
        String real = Tools.require(tool).toString();
        Path looks = Files.createFile(directory.resolve("looks"));
        Tools.stub(directory.resolve(tool), "echo >> '" + looks + "'; exec " + real + " \"$@\"");
        try (Server server = Server.start(); Server.Connection build = server.connect()) {
            Map<String, String> env = Hook.quick(server.port());
            env.put("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0");
            env.put("CONNECTION_SOURCE", tool);
            env.put("PATH", directory.toString());
            List<String> command = shell("exec \"$@\" " + streams);
            command.addAll(Hook.javaCommand());
            try (Hook hook = Hook.run(command, env)) {
                Hook.waitUntil("it has looked 10 times",
                        () -> looks.toFile().length() >= 10 || !hook.process().isAlive());
                assertThat(hook.process().isAlive()).isTrue();
                build.close();
                assertThat(hook.exitCode()).isZero();
            }
        }
    }

    // ---- What it needs ---------------------------------------------------------------------------------------------

    @ParameterizedTest
    @EnumSource(Source.class)
    void itNeedsNoFileItCanWriteAndNeitherHomeNorPath(Source source) {
        Tools.requireRoot();
        if (source.command != null && !source.command.equals("busybox")) {
            Tools.require(source.command);
        }
        // The test's files are in /tmp, perhaps: they are still there in /mnt. BusyBox is called netstat there.
        String netstat = source == Source.busyboxNetstat
                ? "mount --bind " + Tools.require("busybox") + " \"$(readlink -f \"$(command -v netstat)\")\"\n" : "";
        if (source == Source.busyboxNetstat) {
            Tools.require("netstat");
        }
        String script = String.join("\n", "set -e", SYSTEM_PATH, netstat,
                "mount --bind '" + directory + "' /mnt",
                "mount -t tmpfs -o ro none /tmp",
                "mount -o remount,ro,bind /mnt",
                "mount -o remount,ro,bind /",
                "! touch /mnt/x /tmp/x /x /var/x 2>/dev/null",
                "cd /",
                "exec env -u PATH -u HOME -u PWD \"$@\"");
        List<String> command = shell(script, "unshare", "--mount");
        command.addAll(Tools.javaCommandForEveryone(directory.resolve("jars")).stream()
                .map(word -> word.replace(directory.toString(), "/mnt")).toList());
        try (Server server = Server.start(); Server.Connection build = server.connect()) {
            Map<String, String> env = source.environment(server.port(), directory);
            env.remove("PATH");
            try (Hook hook = Hook.run(command, env)) {
                hook.awaitChecks("1", 5);
                build.close();
                assertThat(hook.exitCode()).isZero();
                assertThat(hook.messages("warning")).isEmpty();
            }
        }
    }

    // ---- How it is ended -------------------------------------------------------------------------------------------

    @ParameterizedTest(name = "SIG{0}, exit code {1}")
    @CsvSource({"TERM, 143", "INT, 130"})
    void aSignalEndsItAtOnceAndItsToolWithIt(String signal, int exitCode) throws Exception {
        Path pids = directory.resolve("pids");
        Tools.stub(directory.resolve("netstat"), SYSTEM_PATH + "\nsleep 1000 & echo $! $$ > '" + pids + "'; wait");
        Map<String, String> env = Hook.env("BUILDKITD_PORT", 1, "PATH", directory, "CONNECTION_SOURCE", "netstat");
        // A shell starts its background jobs, so perhaps these tests, with SIGINT ignored.
        List<String> wrapper = List.of(Tools.require("env").toString(), "--default-signal=INT");
        try (Hook hook = Hook.startWith(wrapper, env)) {
            Hook.waitUntil("the tool hangs", () -> pids.toFile().length() > 0);
            long start = System.nanoTime();
            new ProcessBuilder("sh", "-c", "kill -" + signal + " " + hook.process().pid()).inheritIO().start()
                    .waitFor();
            assertThat(hook.exitCode()).isEqualTo(exitCode);
            assertThat(System.nanoTime() - start).isLessThan(4_000_000_000L); // the limit for tools is 5 s
            for (String pid : Files.readString(pids).strip().split(" ")) {
                Hook.waitUntil("the tool is gone", () -> !Tools.running(Long.parseLong(pid)));
            }
        } finally {
            Tools.end(Stream.of(Files.readString(pids).strip().split(" ")).map(Long::valueOf));
        }
    }

    @RepeatedTest(10) // it is a race between the end of the first tool and that of the hook
    void noToolIsStartedAfterASignal() throws Exception {
        Path started = directory.resolve("started");
        // The children of the first are what the hook has to end after it, so that a second one had its chance.
        Tools.stub(directory.resolve("netstat"), SYSTEM_PATH + "\nfor i in $(seq 200); do sleep 1000 & done\n"
                + "echo $$ >> '" + started + "'; exec sleep 1000");
        Tools.stub(directory.resolve("ss"), SYSTEM_PATH + "\necho $$ >> '" + started + "'; exec sleep 1000");
        List<String> pids;
        try (Hook hook = Hook.start(Hook.env("BUILDKITD_PORT", 1, "PATH", directory))) {
            Hook.waitUntil("the first tool hangs", () -> started.toFile().length() > 0);
            hook.process().destroy();
            assertThat(hook.exitCode()).isEqualTo(143);
        } finally {
            pids = Files.readAllLines(started);
            Tools.end(pids.stream().skip(1).map(Long::valueOf));
        }
        assertThat(pids).hasSize(1);
    }

    // ---- Helpers ---------------------------------------------------------------------------------------------------

    private List<String> everyones(List<String> wrapper) {
        List<String> command = new ArrayList<>(wrapper);
        command.addAll(Tools.javaCommandForEveryone(directory.resolve("jars")));
        return command;
    }

    /** A command, to which words can be added, that gives them to a script as its arguments. */
    private static List<String> shell(String script, String... wrapper) {
        List<String> command = new ArrayList<>(List.of(wrapper));
        if (wrapper.length > 0) {
            command.set(0, Tools.require(wrapper[0]).toString());
        }
        command.addAll(List.of("/bin/sh", "-c", script, "sh"));
        return command;
    }

    /** Runs the command with its own stderr in a PID namespace whose PID 1 is a shell that has done the setup. */
    private static List<String> pid1(String setup, List<String> command) {
        // In the background: for a command in the foreground some shells redirect their own stderr meanwhile.
        List<String> all = shell("exec 3>&2; " + setup + "; \"$@\" 2>&3 & wait $!",
                "unshare", "--pid", "--fork", "--mount-proc", "--kill-child");
        all.addAll(command);
        return all;
    }

    private static Map<String, String> inPod(int port) {
        Map<String, String> env = Hook.quick(port);
        env.put("KUBERNETES_SERVICE_HOST", "10.0.0.1");
        return env;
    }
}
