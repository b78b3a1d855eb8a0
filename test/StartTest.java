import static org.assertj.core.api.Assertions.assertThat;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermissions;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/** The ways to start the hook, and the helper that starts it where JBang is not installed. */
class StartTest {

    private static final Path HELPER = Hook.REPOSITORY.resolve("test/jbang");

    private static final List<Way> ways = new ArrayList<>();

    @TempDir
    static Path homes;
    @TempDir
    Path temp;

    /** A way that the README names, with one JDK: what stands before the hook's arguments, and the environment. */
    private record Way(String name, Path java, Map<String, String> env, String... command) {
        Hook start(Server server, String... args) {
            Map<String, String> settings = Hook.quick(server.port());
            settings.putAll(env);
            // Ctrl-C as in a terminal: tests in the background ignore it, and so do their children.
            List<String> line = new ArrayList<>(List.of("env", "--default-signal=INT"));
            line.addAll(List.of(command));
            line.addAll(List.of(args));
            return Hook.run(line, settings, Hook.JBANG_PATIENCE);
        }

        @Override
        public String toString() {
            return name;
        }
    }

    @BeforeAll
    static void findWays() {
        Tools.jdks().forEach((version, jdk) -> {
            Path java = jdk.resolve("bin/java");
            // A home for each JDK, because JBang compiles anew what it finds compiled by a newer one.
            Map<String, String> env = emptyHome(homes.resolve(version));
            env.put("JAVA_HOME", jdk.toString());
            env.put("PATH", HELPER.getParent() + ":" + System.getenv("PATH"));
            ways.add(new Way("jbang with " + version, java, env, HELPER.toString(), Hook.SCRIPT.toString()));
            // Java's exec, like Kubernetes', does not start a file without #!, as a shell does.
            ways.add(new Way("./buildkit-prestop.java with " + version, java, env,
                    "sh", "-c", Hook.SCRIPT + " \"$@\"", "-"));
            ways.add(new Way("java " + version, java, env,
                    java.toString(), "-cp", Tools.picocli().toString(), Hook.SCRIPT.toString()));
        });
    }

    private static Stream<Way> ways() {
        return ways.stream();
    }

    private static Hook start(Path helper, Map<String, String> env, String... args) {
        return Hook.run(Stream.concat(Stream.of(helper.toString()), Stream.of(args)).toList(), env,
                Hook.JBANG_PATIENCE);
    }

    private static void assertPrints(String count, Hook hook) {
        assertThat(hook.exitCode()).describedAs(String.join("\n", hook.err())).isZero();
        assertThat(hook.out()).containsExactly(count);
    }

    @ParameterizedTest
    @MethodSource("ways")
    void waitsAndLeavesWithTheHooksExitCodeHoweverItWasStarted(Way way) {
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook waiting = way.start(server); Hook mistaken = way.start(server, "--port", "none")) {
            waiting.awaitLog("1 connection to port " + server.port());
            build.close();
            assertThat(waiting.exitCode()).isZero();
            assertThat(mistaken.exitCode()).isEqualTo(2);
        }
    }

    @ParameterizedTest
    @MethodSource("ways")
    void everySourceWorksHoweverItWasStarted(Way way) {
        Tools.require("netstat");
        Tools.require("ss");
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook netstat = way.start(server, "--once", "--source=netstat");
                Hook ss = way.start(server, "--once", "--source=ss");
                Hook procfs = way.start(server, "--once", "--source=procfs")) {
            List.of(netstat, ss, procfs).forEach(hook -> assertPrints("1", hook));
        }
    }

    @ParameterizedTest
    @MethodSource("ways")
    void endsAtOnceOnSigtermAndCtrlCHoweverItWasStarted(Way way) throws Exception {
        for (int[] signalAndCode : new int[][] {{15, 143}, {2, 130}}) {
            try (Server server = Server.start(); Server.Connection build = server.connect();
                    Hook hook = way.start(server)) {
                hook.awaitLog("1 connection to port " + server.port());
                ProcessHandle start = hook.process().toHandle();
                List<ProcessHandle> all = new ArrayList<>();
                List<ProcessHandle> jvms = new ArrayList<>();
                // A shell may wait for ./buildkit-prestop.java, as it does for any command. There is no second JVM,
                // but for the moment in which the child that will be a tool is still a copy of the hook.
                Hook.waitUntil("there is one JVM", () -> {
                    all.clear();
                    Stream.concat(Stream.of(start), start.descendants()).forEach(all::add);
                    jvms.clear();
                    all.stream().filter(process -> process.info().command().orElse("").endsWith("/java"))
                            .forEach(jvms::add);
                    return jvms.size() == 1;
                });
                assertThat(jvms.get(0).info().command()).contains(way.java.toRealPath().toString());
                assertThat(Hook.run(List.of("sh", "-c", "kill -$0 $1", "" + signalAndCode[0], "" + jvms.get(0).pid()),
                        Map.of()).exitCode()).isZero();
                assertThat(hook.exitCode()).isEqualTo(signalAndCode[1]);
                Hook.waitUntil("no process is left", () -> all.stream().noneMatch(ProcessHandle::isAlive));
            }
        }
    }

    @Test
    void runsFromAReadOnlyDirectoryOfSymlinksAsAConfigMapIsMounted() throws IOException {
        Path data = Files.createDirectory(temp.resolve("..2026_11_23_12_00_00.123456789"));
        Files.copy(Hook.SCRIPT, data.resolve("buildkit-prestop.java"));
        Files.createSymbolicLink(temp.resolve("..data"), data.getFileName());
        Path mounted = Files.createSymbolicLink(temp.resolve("buildkit-prestop.java"),
                Path.of("..data/buildkit-prestop.java"));
        Files.setPosixFilePermissions(mounted, PosixFilePermissions.fromString("r--r--r--"));
        Files.setPosixFilePermissions(data, PosixFilePermissions.fromString("r-xr-xr-x"));
        try (Server server = Server.start(); Hook hook = start(HELPER, Hook.env("HOME", Tools.HOME,
                "BUILDKITD_PORT", server.port()), mounted.toString(), "--once")) {
            assertPrints("0", hook);
        } finally {
            Files.setPosixFilePermissions(data, PosixFilePermissions.fromString("rwxr-xr-x"));
        }
    }

    @Test
    void runsForAnotherUserFromACacheMadeBeforeOnAReadOnlyFileSystemWithoutNetworkAndHome() throws IOException {
        Tools.requireRoot();
        Map<String, String> env = emptyHome(temp);
        Path script = Files.copy(Hook.SCRIPT, temp.resolve("buildkit-prestop.java"));
        Path helper = Files.copy(HELPER, temp.resolve("jbang"));
        env.put("JBANG_REPO", env.remove("HOME") + "/.m2/repository");
        assertThat(start(helper, env, "build", script.toString()).exitCode()).isZero();
        assertThat(Hook.run(List.of("chmod", "-R", "a+rX", temp.toString()), Map.of()).exitCode()).isZero();
        List<String> asNobody = List.of("unshare", "--net", "--mount", "sh", "-c",
                "mount --bind $0 $0 && mount -o remount,ro,bind $0 && exec setpriv --reuid 65534 --regid 65534"
                        + " --clear-groups $0/jbang $0/buildkit-prestop.java --once", temp.toString());
        Hook hook = Hook.run(asNobody, env, Hook.JBANG_PATIENCE);
        assertThat(hook.exitCode()).isEqualTo(1);
        assertThat(hook.messages("warning")).singleElement().asString().contains("nothing listens on port 1234");
    }

    @Test
    void waitsWithinAMemoryLimitOf64MbFromAWarmCache() throws IOException {
        Path group = memoryLimited("64M");
        Map<String, String> env = Hook.env("HOME", Tools.HOME, "MAX_WAIT_SECONDS", "3");
        try (Server server = Server.start(); Server.Connection build = server.connect()) {
            env.put("BUILDKITD_PORT", String.valueOf(server.port()));
            Hook hook = Hook.run(List.of("sh", "-c", "echo $$ > $0/cgroup.procs && exec \"$@\"", group.toString(),
                    HELPER.toString(), Hook.SCRIPT.toString()), env, Hook.JBANG_PATIENCE);
            hook.awaitLog("1 connection to port " + server.port());
            assertThat(hook.exitCode()).isEqualTo(124);
        } finally {
            Files.delete(group);
        }
    }

    /** A new cgroup, of version 1 or 2, with this memory limit; the test is skipped where none can be made. */
    private static Path memoryLimited(String limit) {
        Path version1 = Path.of("/sys/fs/cgroup/memory");
        boolean one = Files.exists(version1);
        Path group = (one ? version1 : version1.getParent()).resolve("buildkit-prestop-" + System.nanoTime());
        try {
            Files.createDirectory(group);
            Files.writeString(group.resolve(one ? "memory.limit_in_bytes" : "memory.max"), limit);
            if (!one) {
                Files.writeString(group.resolve("memory.swap.max"), "0"); // else what is too much is swapped out
            }
            return group;
        } catch (IOException e) {
            group.toFile().delete();
            return Assumptions.abort("needs the right to make a cgroup with a memory limit: " + e);
        }
    }

    @Test
    void twoStartsAtTheSameMomentOnAColdCacheBothWork() {
        Map<String, String> env = emptyHome(temp);
        try (Server server = Server.start()) {
            env.put("BUILDKITD_PORT", String.valueOf(server.port()));
            Stream.generate(() -> start(HELPER, env, Hook.SCRIPT.toString(), "--once")).limit(4).toList()
                    .forEach(hook -> assertPrints("0", hook));
        }
    }

    /** A HOME in which JBang has compiled nothing yet; what was fetched before is there, so no network is needed. */
    private static Map<String, String> emptyHome(Path home) {
        Tools.copyFetched(home.resolve(".jbang"), home.resolve(".m2/repository"));
        return Hook.env("HOME", home, "JBANG_DIR", home.resolve(".jbang"));
    }

    @Test
    void theHelperTakesTheInstalledJBangAndNotItself() throws IOException {
        Path installed = Files.writeString(Files.createDirectory(temp.resolve("bin")).resolve("jbang"),
                "#!/bin/sh\necho installed: \"$@\"\nexit 7\n");
        Files.setPosixFilePermissions(installed, PosixFilePermissions.fromString("rwxr-xr-x"));
        Path alias = Files.createSymbolicLink(Files.createDirectory(temp.resolve("alias")).resolve("jbang"), HELPER);
        String path = alias.getParent() + ":" + HELPER.getParent() + ":" + installed.getParent() + ":"
                + System.getenv("PATH");
        for (Path start : List.of(HELPER, alias)) {
            Hook hook = start(start, Hook.env("PATH", path), "run", "a b", "c");
            assertThat(hook.exitCode()).isEqualTo(7);
            assertThat(hook.out()).containsExactly("installed: run a b c");
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"java", "mvn"})
    void theHelperSaysWhatIsMissing(String missing) throws IOException {
        Path bin = Files.createDirectory(temp.resolve("bin"));
        for (String tool : List.of("sh", "env", "dirname", "mkdir", "getent", "id", "cut", "mktemp", "rm", "flock")) {
            Files.createSymbolicLink(bin.resolve(tool), Tools.require(tool));
        }
        if (missing.equals("mvn")) {
            Files.createSymbolicLink(bin.resolve("java"), Path.of(System.getProperty("java.home"), "bin/java"));
        }
        Hook hook = start(HELPER, Hook.env("PATH", bin, "HOME", temp), "--version");
        assertThat(hook.exitCode()).isEqualTo(127);
        assertThat(hook.err()).containsExactly("test/jbang: needs JBang, or a JDK 17 or newer and Maven:"
                + " there is no jbang and no " + missing);
    }

    @Test
    void theHelperPassesOnWhatJBangItselfPrintsAndItsExitCode() {
        Map<String, String> env = Hook.env("HOME", Tools.HOME);
        Hook version = start(HELPER, env, "--version");
        assertThat(version.exitCode()).isZero();
        assertThat(version.err()).last().asString().matches("\\d+\\.\\d+\\.\\d+.*");
        Hook wrong = start(HELPER, env, "no-such-file.java");
        assertThat(wrong.exitCode()).isNotZero();
        assertThat(wrong.err()).isNotEmpty();
    }
}
